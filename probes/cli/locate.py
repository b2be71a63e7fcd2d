"""`safe-decode locate`: which heads and neurons a model's refusals and answers hang on.

Knows the options, the order of the work and how the outcome is shown. Does not know how
responses are sorted, how units are scored or how anything is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from probes.cli.location_tables import draw_located, located_json, show_located
from safe_decode.cli.console import print_json, require_place, write_text
from safe_decode.cli.generate import Device, DtypeName, ModelName
from safe_decode.cli.options import loaded_model
from safe_decode.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.location.prompts import LocationData, PromptFile
    from probes.location.units import Ranking, UnitSet
    from probes.rollouts.generate import RolloutConfig
    from safe_decode.loading import Loaded

__all__ = ["locate"]

_MIN_REFUSALS = 50  # fewer distinct texts hardly have a variance to score
_SEARCHED = 1 / 3  # of the prompts, when ratios are searched


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
    search: Annotated[
        bool,
        typer.Option(
            help="Search the three shares on a third of the prompts, kept from location; "
            "--redundant, --safety and --utility are then not used."
        ),
    ] = False,
    kept: Annotated[
        Path | None,
        typer.Option(help="Keep what is done in this directory, so that an ended run goes on."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write shares.png and importance.png to this directory.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write tables and pictures to this self-contained page.")
    ] = None,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Locate safety-critical, utility-critical, complex and redundant units of a model."""
    _require_sense(out, html, (responses, plot, kept), samples=samples, temperature=temperature)
    from probes.analysis.ratio_search import apart
    from probes.location.locate import LocateConfig
    from probes.location.locate import locate as locate_units
    from probes.location.prompts import answered, location_data, read_prompts
    from probes.location.units import Ratios
    from probes.rollouts.generate import RolloutConfig

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
    loaded = loaded_model(model, device, dtype)
    said = {}
    for name, file in files.items():
        answer = partial(
            answered, loaded.model, loaded.tokenizer, file, samples=samples, config=sampling
        )
        made_of = {"digest": file.digest, "samples": samples, **asdict(sampling)}
        said[name] = _kept_answers(kept, name, made_of, answer)
    if responses is not None:
        _write_responses(responses, said)
    phrases = tuple(refusal_phrase or ())
    parts = {
        name: apart(rows, share=_SEARCHED if search else 0, seed=seed)
        for name, rows in said.items()
    }
    data = location_data(
        parts["harmful"][0], parts["benign"][0], min_refusals=_MIN_REFUSALS, phrases=phrases
    )
    units = locate_units(
        loaded.model, loaded.tokenizer, data.refusals, data.benign, config, kept=kept
    )
    if search:
        others = location_data(
            parts["harmful"][1], parts["benign"][1], min_refusals=1, phrases=phrases
        )
        units = _with_searched_ratios(loaded, units, data, others, parts["harmful"][1], ranking)
    record = {
        "seen_groups": sorted({row.group for rows in said.values() for row in rows}),
        **_origin(loaded, model, files, data),
        "phrases": list(phrases),
        "generation": _generation(files, sampling, samples),
    }
    units = replace(units, provenance={**units.provenance, **record})
    units.save(out)
    drawn = draw_located(units, plot=plot, html=html)
    if as_json:
        print_json(located_json(units, out))
    else:
        show_located(units, out, drawn)


def _require_sense(
    out: Path,
    html: Path | None,
    folders: tuple[Path | None, ...],
    *,
    samples: int,
    temperature: float,
) -> None:
    """Check, before any work, what could only fail after it."""
    require_place(out)
    require_place(html)
    for folder in folders:
        if folder is not None:
            require_place(folder / "file")
    if samples > 1 and temperature == 0:
        raise ConfigurationError(
            f"--samples={samples} without --temperature would be {samples} times the same text; "
            "pass a temperature above 0."
        )
    if html is not None or folders[1] is not None:
        from probes.reports.figures import require_plots

        require_plots()


def _require_enough(harmful: PromptFile, samples: int) -> None:
    """Refuse a file that cannot yield enough refusals, before a model is loaded."""
    most = len(harmful.requests) * samples + len(harmful.conversations)
    if most < _MIN_REFUSALS:
        raise DataError(
            f"{harmful.path} yields at most {most} responses, wanted at least {_MIN_REFUSALS} "
            "distinct refusals; pass more harmful prompts, or --samples with --temperature."
        )


def _kept_answers(
    kept: Path | None,
    name: str,
    made_of: Mapping[str, object],
    answer: Callable[[], list[Conversation]],
) -> list[Conversation]:
    """Return the responses that an ended run has left, or let the model answer and keep them."""
    if kept is None:
        return answer()
    import json

    from probes.data.conversations import read_jsonl, write_jsonl

    path, note = kept / f"{name}.jsonl", kept / f"{name}.json"
    told = json.dumps(made_of, sort_keys=True)
    if path.exists() and note.exists():
        if note.read_text(encoding="utf-8") != told:
            raise ConfigurationError(
                f"{kept} keeps responses to other prompts or of other options; pass another "
                "directory, or delete what it holds."
            )
        return read_jsonl(path)
    rows = answer()
    write_jsonl(path, rows)
    write_text(note, told)
    return rows


def _with_searched_ratios(
    loaded: Loaded,
    units: UnitSet,
    located: LocationData,
    searched: LocationData,
    asked: Sequence[Conversation],
    ranking: Ranking,
) -> UnitSet:
    """Assign categories anew by ratios searched on prompts that were not located on."""
    from probes.analysis.behaviour import refusal_first_tokens
    from probes.analysis.ratio_search import SearchData, search_ratios
    from probes.location.units import assign
    from probes.rollouts.types import Request

    tokens = refusal_first_tokens(loaded.tokenizer, located.refusals, located.benign)
    requests = [Request(messages=row.messages, group=row.group) for row in asked]
    data = SearchData(requests, searched.benign, tokens)
    found = search_ratios(loaded.model, loaded.tokenizer, units, data, ranking=ranking)
    record = {**units.provenance, "search": {**found.to_json(), "counts": searched.counts}}
    return assign(units, found.ratios, ranking=ranking, provenance=record)


def _write_responses(folder: Path, said: Mapping[str, Sequence[Conversation]]) -> None:
    from probes.data.conversations import write_jsonl

    for name, rows in said.items():
        write_jsonl(folder / f"{name}.jsonl", rows)


def _origin(
    loaded: Loaded, model: str | None, files: Mapping[str, PromptFile], data: LocationData
) -> dict[str, object]:
    """Say for the record what was located on."""
    from probes.data.refusal_rule import RULE
    from safe_decode.bundle.fingerprint import Fingerprint

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
