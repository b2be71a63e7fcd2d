"""`safe-decode bench`: what the guard costs on this machine.

Knows the options and how figures are shown. Does not know how they are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json, progress, require_place
from safe_decode.cli.loading import bundle_of, loaded_bundle
from safe_decode.cli.options import BundleOptions, JsonOptions, ModelOptions
from safe_decode.cli.tables import WordTable, print_table
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from safe_decode.bench.arms import Load
    from safe_decode.bench.compare import Change
    from safe_decode.bench.models import ProbeShape, Subject

__all__ = ["bench"]


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ModelOptions, BundleOptions, JsonOptions):
    """Options of `safe-decode bench`."""

    shape: Annotated[
        str | None,
        typer.Option(
            help="Named model shape that gets random weights, instead of a model that is loaded. "
            "An unknown name prints those there are."
        ),
    ] = None
    batch: Annotated[
        str, typer.Option(help="Rows of a batch; several sizes separated by commas.")
    ] = "1,32"
    context: Annotated[
        str, typer.Option(help="Tokens of each prompt; several lengths separated by commas.")
    ] = "128"
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each call generates.")] = 64
    rounds: Annotated[int, typer.Option(min=2, help="Times that every arm runs.")] = 20
    features: Annotated[
        int, typer.Option(min=1, help="Features that the probe of --shape reads.")
    ] = 256
    heads: Annotated[int, typer.Option(min=1, help="Heads of the probe of --shape.")] = 1
    sites: Annotated[
        int | None,
        typer.Option(
            min=1, help="Layers whose MLP the probe of --shape reads. Without it: every layer."
        ),
    ] = None
    grow: Annotated[
        list[str] | None,
        typer.Option(
            help="Quantity to vary, alone or with its values, as in `features` or "
            "`batch=1,8,64`. Needs --shape. May be given several times."
        ),
    ] = None
    mode: Annotated[
        str,
        typer.Option(
            help="How the model runs: eager, compiled or cuda-graph (on CUDA only); several "
            "separated by commas."
        ),
    ] = "eager"
    arms: Annotated[
        str,
        typer.Option(
            help="Arms to run beside the bare model, separated by commas. Without it: every arm."
        ),
    ] = ""
    clock: Annotated[
        Literal["wall", "cpu"],
        typer.Option(
            help="Which time is measured: wall, or processor time (cpu) where other programs keep "
            "the machine busy."
        ),
    ] = "wall"
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that torch uses. Without it: torch's own choice."),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(help="Write the figures and the machine's card to this JSON lines file."),
    ] = None
    plot: Annotated[Path | None, typer.Option(help="Draw the figures to this image file.")] = None
    compare: Annotated[
        Path | None,
        typer.Option(help="File of an earlier run, written by --out, to compare the figures with."),
    ] = None


@command("Tools")
def bench(options: BenchOptions) -> None:
    """Measure what the guard costs, every arm beside the bare model in one run."""
    require_place(options.out)
    require_place(options.plot)
    from safe_decode.bench.compare import compare as compared
    from safe_decode.bench.machine import card, read_lines, write_lines

    old = read_lines(options.compare)[0] if options.compare is not None else []
    _set_threads(options.threads)
    rows = _measured(options)
    facts = card(rounds=options.rounds, clock=options.clock, threads=_threads())
    changes = compared(old, rows) if options.compare is not None else []
    if options.out is not None:
        write_lines(options.out, rows, facts)
    if options.plot is not None:
        from safe_decode.bench.plots import plot as draw

        draw(rows, options.plot)
    if options.as_json:
        shown = {"changes": [change.__dict__ for change in changes]} if options.compare else {}
        print_json({"rows": rows, "card": facts, **shown})
    else:
        _show(rows, facts, changes)


def _measured(options: BenchOptions) -> list[dict[str, Any]]:
    from safe_decode.bench.arms import Load
    from safe_decode.bench.compile_modes import modes_of
    from safe_decode.bench.models import ProbeShape

    probe = ProbeShape(features=options.features, heads=options.heads, sites=options.sites)
    loads = [
        Load(rows, tokens, options.new_tokens, options.clock, mode=how)
        for how in modes_of(options.mode, options.device)
        for rows in _numbers("batch", options.batch)
        for tokens in _numbers("context", options.context)
    ]
    if options.grow:
        return _grown(options, options.grow, probe, loads[0])
    subject = _subject(options, probe)
    return _ladders(subject, loads, options.rounds, _names(options.arms))


def _ladders(
    subject: Subject, loads: Sequence[Any], rounds: int, only: tuple[str, ...]
) -> list[dict[str, Any]]:
    from safe_decode.bench.arms import ARMS
    from safe_decode.bench.runner import ladder_rows

    rows: list[dict[str, Any]] = []
    n_arms = len({"bare", *only}) if only else len(ARMS)
    with progress("measuring", len(loads) * n_arms * (rounds + 1)) as tick:
        for load in loads:
            rows += ladder_rows(subject, load, rounds=rounds, only=only, tick=tick)
    return rows


def _grown(
    options: BenchOptions, grow: Sequence[str], probe: ProbeShape, load: Load
) -> list[dict[str, Any]]:
    from safe_decode.bench.scaling import Made, growth_rows, values_of

    if options.shape is None:
        raise ConfigurationError("--grow needs a model that can be varied; pass --shape as well.")
    rounds = options.rounds
    axes = [values_of(text) for text in grow]
    made = Made(options.shape, probe, options.device, options.dtype)
    rows: list[dict[str, Any]] = []
    with progress("measuring", sum(len(v) for _, v in axes) * 2 * (rounds + 1)) as tick:
        for axis, values in axes:
            rows += growth_rows(made, axis, values, load, rounds=rounds, tick=tick)
    return rows


def _subject(options: BenchOptions, probe: ProbeShape) -> Subject:
    from safe_decode.bench.models import Subject, embedded_subject, of_shape

    model, bundle = options.model, bundle_of(options.model, options.bundle)
    if options.shape is not None:
        if model is not None or bundle is not None:
            raise ConfigurationError("pass either --shape or --model with --bundle, not both.")
        return of_shape(options.shape, probe=probe, device=options.device, dtype=options.dtype)
    if (model is None) != (bundle is None):
        raise ConfigurationError("--model and --bundle go together; pass both or neither.")
    if model is None or bundle is None:
        return embedded_subject(options.device)
    loaded = options.load_model()
    return Subject(Path(model).name, loaded.model, loaded.tokenizer, loaded_bundle(bundle))


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(one) for one in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigurationError(f"--{name} {text!r} wants positive numbers, as in 1,32.")
    return numbers


def _names(text: str) -> tuple[str, ...]:
    from safe_decode.bench.arms import ARMS

    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ConfigurationError(f"--arms {unknown[0]!r} is not one of {', '.join(ARMS)}.")
    return names


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _show(
    rows: Sequence[Mapping[str, Any]], facts: Mapping[str, object], changes: Sequence[Change]
) -> None:
    is_ladder = "arm" in rows[0]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        named = "{subject}, {mode}, batch {batch}, context {context}"
        title = (named if is_ladder else "{axis}, slope {slope_us_per_unit:g} us").format(**row)
        groups.setdefault(title, []).append(row)
    screen = console()
    for title, group in groups.items():
        columns = _LADDER if is_ladder else _GROWTH
        if is_ladder and group[0]["device_tpot_us"] is not None:
            columns = {**columns, **_DEVICE}
        print_table(_table(title, group, columns))
    screen.print("; ".join(f"{name}: {value}" for name, value in facts.items()), soft_wrap=True)
    for change in changes:
        screen.print(
            f"{change.verdict}: {change.what}: {change.old:.4f} then, {change.new:.4f} now"
        )


def _table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> WordTable:
    cells = [[_cell(row[name]) for name in columns] for row in rows]
    return WordTable(list(columns.values()), cells, title, right=set(columns.values()))


_LADDER = {
    "arm": "arm",
    "tpot_us": "us a token",
    "tpot_p95_us": "p95",
    "added_us": "added us",
    "ratio": "ratio",
    "ratio_95": "95 %",
    "ttft_ms": "first ms",
    "rest_ms": "rest ms",
    "added_kib": "KiB",
}
_DEVICE = {
    "device_tpot_us": "device us",
    "device_ratio": "device ratio",
    "device_ratio_95": "95 %",
    "added_waits_per_step": "waits",
}
_GROWTH = {
    "value": "value",
    "bare_us": "bare us",
    "added_us": "added us",
    "slope_us_95": "slope, 95 %",
}


def _cell(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(_cell(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
