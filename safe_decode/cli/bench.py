"""`safe-decode bench`: what the guard costs on this machine.

Knows the options and how figures are shown. Does not know how they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safe_decode.cli.console import console, print_json, progress, require_place
from safe_decode.cli.generate import BundlePath, Device, DtypeName, ModelName
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.table import Table

    from safe_decode.bench.compare import Change
    from safe_decode.bench.models import Subject

__all__ = ["bench"]

Tick = Callable[[int], None]


def bench(
    model: ModelName = None,
    bundle: BundlePath = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Instead of a model: a named shape with random weights; an unknown one lists them."
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Rows, several by comma.")] = "1,32",
    context: Annotated[str, typer.Option(help="Prompt tokens, several by comma.")] = "128",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each call.")] = 64,
    rounds: Annotated[int, typer.Option(min=2, help="Times every arm runs.")] = 20,
    features: Annotated[int, typer.Option(min=1, help="Of a shape's probe.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="Of a shape's probe.")] = 1,
    sites: Annotated[int | None, typer.Option(min=1, help="Of a shape's probe.")] = None,
    grow: Annotated[
        list[str] | None,
        typer.Option(help="Vary one thing, as in `features` or `batch=1,8,64`; needs --shape."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="eager, compiled, cuda-graph (CUDA alone); several by comma.")
    ] = "eager",
    arms: Annotated[str, typer.Option(help="Arms beside bare, by comma; default all.")] = "",
    clock: Annotated[
        Literal["wall", "cpu"], typer.Option(help="cpu: where the machine is busy.")
    ] = "wall",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
    out: Annotated[Path | None, typer.Option(help="Write JSON lines with the card.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw into this image.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Say what got slower since.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what the guard costs, every arm beside the bare model in one run."""
    require_place(out)
    require_place(plot)
    from safe_decode.bench.arms import Load
    from safe_decode.bench.compare import compare as compared
    from safe_decode.bench.compile_modes import modes_of
    from safe_decode.bench.machine import card, read_lines, write_lines
    from safe_decode.bench.models import ProbeShape

    old = read_lines(compare)[0] if compare is not None else []
    _set_threads(threads)
    probe = ProbeShape(features=features, heads=heads, sites=sites)
    loads = [
        Load(rows, tokens, new_tokens, clock, mode=how)
        for how in modes_of(mode, device)
        for rows in _numbers("batch", batch)
        for tokens in _numbers("context", context)
    ]
    if grow:
        rows = _grown(grow, shape, probe, loads[0], rounds, device, dtype)
    else:
        subject = _subject(model, bundle, shape, probe, device, dtype)
        rows = _ladders(subject, loads, rounds, _names(arms))
    facts = card(rounds=rounds, clock=clock, threads=_threads())
    changes = compared(old, rows) if compare is not None else []
    if out is not None:
        write_lines(out, rows, facts)
    if plot is not None:
        from safe_decode.bench.plots import plot as draw

        draw(rows, plot)
    if as_json:
        shown = [change.__dict__ for change in changes]
        print_json({"rows": rows, "card": facts, **({"changes": shown} if compare else {})})
    else:
        _show(rows, facts, changes)


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
    grow: Sequence[str],
    shape: str | None,
    probe: Any,  # noqa: ANN401 - a ProbeShape, imported late
    load: Any,  # noqa: ANN401 - a Load, imported late
    rounds: int,
    device: str,
    dtype: str,
) -> list[dict[str, Any]]:
    from safe_decode.bench.scaling import Made, growth_rows, values_of

    if shape is None:
        raise ConfigurationError("--grow needs a model that can be varied; pass --shape as well.")
    axes = [values_of(text) for text in grow]
    made = Made(shape, probe, device, dtype)
    rows: list[dict[str, Any]] = []
    with progress("measuring", sum(len(v) for _, v in axes) * 2 * (rounds + 1)) as tick:
        for axis, values in axes:
            rows += growth_rows(made, axis, values, load, rounds=rounds, tick=tick)
    return rows


def _subject(
    model: str | None,
    bundle: Path | None,
    shape: str | None,
    probe: Any,  # noqa: ANN401 - a ProbeShape, imported late
    device: str,
    dtype: Any,  # noqa: ANN401 - a Dtype
) -> Subject:
    from safe_decode.bench.models import Subject, embedded_subject, of_shape

    if shape is not None:
        if model is not None or bundle is not None:
            raise ConfigurationError("pass either --shape or --model with --bundle, not both.")
        return of_shape(shape, probe=probe, device=device, dtype=dtype)
    if (model is None) != (bundle is None):
        raise ConfigurationError("--model and --bundle go together; pass both or neither.")
    if model is None or bundle is None:
        return embedded_subject(device)
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.loading import load_model

    loaded = load_model(model, device=device, dtype=dtype)
    return Subject(Path(model).name, loaded.model, loaded.tokenizer, ProbeBundle.load(bundle))


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
        screen.print(_table(title, group, columns))
    screen.print("; ".join(f"{name}: {value}" for name, value in facts.items()), soft_wrap=True)
    for change in changes:
        screen.print(
            f"{change.verdict}: {change.what}: {change.old:.4f} then, {change.new:.4f} now"
        )


def _table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Table:
    from rich.table import Table as Drawn

    table = Drawn(title=title)
    for column in columns.values():
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in columns))
    return table


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
