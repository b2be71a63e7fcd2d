"""`safe-decode locate`: which heads and neurons a model's refusals and answers hang on.

Knows the options, the order of the work and how the outcome is shown. Does not know how
responses are sorted, how units are scored or how anything is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from safe_decode.commands.generate import Device, DtypeName, ModelName
from safe_decode.commands.output import console, print_json, require_place, working
from safe_decode.demo.load import Dtype, Loaded
from safe_decode.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from probes.answers import LocationData, PromptFile
    from probes.conversations import Conversation
    from probes.rollouts import RolloutConfig
    from probes.units import UnitSet

__all__ = ["locate"]

_MIN_REFUSALS = 50  # fewer distinct texts hardly have a variance to score


def locate(
    harmful: Annotated[
        Path,
        typer.Option(help="Harmful prompts as JSON lines, with or without the model's responses."),
    ],
    benign: Annotated[Path, typer.Option(help="Benign prompts, in the same form.")],
    out: Annotated[Path, typer.Option(help="Write the units to this safetensors file.")],
    model: ModelName = None,
    variant: Annotated[
        Literal["flap", "plain"],
        typer.Option(help="flap squares the attention metric before heads are averaged."),
    ] = "flap",
    ranking: Annotated[
        Literal["joint", "separate"],
        typer.Option(help="Rank heads and neurons together, or each kind on its own."),
    ] = "joint",
    redundant: Annotated[float, typer.Option(help="Share of units that is redundant, RU.")] = 0.13,
    safety: Annotated[float, typer.Option(help="Share that is safety-critical, SCU.")] = 0.02,
    utility: Annotated[float, typer.Option(help="Share that is utility-critical, UCU.")] = 0.13,
    refusal_phrase: Annotated[
        list[str] | None,
        typer.Option(help="A further phrase that opens refusals; may be given several times."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of the responses; 0 is greedy.")
    ] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Cap of a response.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses generated together.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    responses: Annotated[
        Path | None,
        typer.Option(
            help="Write harmful.jsonl and benign.jsonl with the responses to this directory; "
            "given as --harmful and --benign, they are not generated again."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write shares.png and importance.png to this directory.")
    ] = None,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Locate safety-critical, utility-critical, complex and redundant units of a model."""
    _require_sense(out, responses, plot, samples=samples, temperature=temperature)
    from probes.answers import answered, location_data, read_prompts
    from probes.locate import LocateConfig
    from probes.locate import locate as locate_units
    from probes.rollouts import RolloutConfig
    from probes.units import Ratios

    config = LocateConfig(
        variant=variant,
        ranking=ranking,
        ratios=Ratios(redundant=redundant, safety=safety, utility=utility),
        min_refusals=_MIN_REFUSALS,
    )
    sampling = RolloutConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        seed=seed,
        batch_size=batch_size,
    )
    files = {"harmful": read_prompts(harmful), "benign": read_prompts(benign)}
    _require_enough(files["harmful"], samples)
    loaded = _loaded(model, device, dtype)
    said = {
        name: answered(loaded.model, loaded.tokenizer, file, samples=samples, config=sampling)
        for name, file in files.items()
    }
    if responses is not None:
        _write_responses(responses, said)
    phrases = tuple(refusal_phrase or ())
    data = location_data(
        said["harmful"], said["benign"], min_refusals=_MIN_REFUSALS, phrases=phrases
    )
    units = locate_units(loaded.model, loaded.tokenizer, data.refusals, data.benign, config)
    record = {
        **_origin(loaded, model, files, data),
        "phrases": list(phrases),
        "generation": _generation(files, sampling, samples),
    }
    units = replace(units, provenance={**units.provenance, **record})
    units.save(out)
    if plot is not None:
        _draw(units, plot)
    if as_json:
        print_json(_as_json(units, out))
    else:
        _show(units, out, plot)


def _require_sense(
    out: Path, responses: Path | None, plot: Path | None, *, samples: int, temperature: float
) -> None:
    """Check, before any work, what could only fail after it."""
    require_place(out)
    for folder in (responses, plot):
        if folder is not None:
            require_place(folder / "file")
    if samples > 1 and temperature == 0:
        raise ConfigurationError(
            f"--samples={samples} without --temperature would be {samples} times the same text; "
            "pass a temperature above 0."
        )
    if plot is not None:
        from probes.report import require_plots

        require_plots()


def _require_enough(harmful: PromptFile, samples: int) -> None:
    """Refuse a file that cannot yield enough refusals, before a model is loaded."""
    most = len(harmful.requests) * samples + len(harmful.conversations)
    if most < _MIN_REFUSALS:
        raise DataError(
            f"{harmful.path} yields at most {most} responses, wanted at least {_MIN_REFUSALS} "
            "distinct refusals; pass more harmful prompts, or --samples with --temperature."
        )


def _loaded(model: str | None, device: str, dtype: Dtype) -> Loaded:
    from safe_decode.demo.load import artefact, load_model

    name = model or artefact("aligned")
    with working("Loading the model"):
        from transformers.utils import logging

        # Standard error is kept for our own progress, and for errors of one line.
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        return load_model(name, device=device, dtype=dtype)


def _write_responses(folder: Path, said: Mapping[str, Sequence[Conversation]]) -> None:
    from probes.conversations import write_jsonl

    for name, rows in said.items():
        write_jsonl(folder / f"{name}.jsonl", rows)


def _origin(
    loaded: Loaded, model: str | None, files: Mapping[str, PromptFile], data: LocationData
) -> dict[str, object]:
    """Say for the record what was located on."""
    from probes.refusals import RULE
    from safe_decode.fingerprint import Fingerprint

    return {
        "model": model or "embedded, aligned",
        "fingerprint": asdict(Fingerprint.of(loaded.model, loaded.tokenizer)),
        "files": {
            name: {"name": file.path.name, "digest": file.digest, "left_out": file.left_out}
            for name, file in files.items()
        },
        "refusal_rule": RULE,
        "counts": data.counts,
    }


def _generation(
    files: Mapping[str, PromptFile], sampling: RolloutConfig, samples: int
) -> dict[str, object] | None:
    """Say for the record how responses came to be; None where the files held them."""
    generated = [name for name, file in files.items() if file.requests]
    return {"of": generated, "samples": samples, **asdict(sampling)} if generated else None


def _draw(units: UnitSet, folder: Path) -> None:
    from probes.report import draw_importance, draw_shares

    draw_shares(units, folder / "shares.png")
    draw_importance(units, folder / "importance.png")


def _as_json(units: UnitSet, out: Path) -> dict[str, object]:
    from probes.report import category_counts
    from probes.units import CATEGORIES

    def named(counts: NDArray[np.int64]) -> dict[str, dict[str, int]]:
        kinds = zip(("heads", "neurons"), counts.tolist(), strict=True)
        return {kind: dict(zip(CATEGORIES, row, strict=True)) for kind, row in kinds}

    counts = category_counts(units)
    layers = [{"layer": layer, **named(here)} for layer, here in enumerate(counts)]
    return {
        "out": str(out),
        "units": len(units),
        "counts": units.counts(),
        "shares": {name: count / len(units) for name, count in units.counts().items()},
        "all": named(counts.sum(axis=0)),
        "layers": layers,
        "provenance": dict(units.provenance),
    }


def _show(units: UnitSet, out: Path, plot: Path | None) -> None:
    from rich.table import Table

    from probes.report import category_counts
    from probes.units import CATEGORIES

    counts = category_counts(units)
    table = Table(
        title="Share of a layer's units, and its safety-critical ones",
        title_justify="left",
    )
    for name in ("layer", *CATEGORIES, "SCU heads", "SCU neurons"):
        table.add_column(name, justify="right")
    critical = CATEGORIES.index("SCU")

    def add(name: str, here: NDArray[np.int64]) -> None:
        shares = here.sum(axis=0) / max(here.sum(), 1)
        cells = [f"{share:.1%}" for share in shares]
        table.add_row(name, *cells, *(str(count) for count in here[:, critical]))

    for layer, here in enumerate(counts):
        add(str(layer), here)
    table.add_section()
    add("all", counts.sum(axis=0))
    screen = console()
    screen.print(table)
    found = units.provenance["counts"]
    screen.print(
        f"located on {found['refusals']} refusals ({found['distinct_refusals']} distinct) among "
        f"{found['harmful_responses']} responses to harmful prompts, and {found['benign_answers']} "
        f"answers among {found['benign_responses']} to benign ones",
        soft_wrap=True,
    )
    screen.print(f"units: {out}" + ("" if plot is None else f"; plots: {plot}"), soft_wrap=True)
