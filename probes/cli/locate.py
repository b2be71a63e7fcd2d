"""`safe-decode locate`: which heads and neurons a model's refusals and answers hang on.

Knows the options, the order of the work and how the outcome is shown. Does not know how
responses are sorted, how units are scored or how anything is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from probes.cli.options import BatchSize, RefusalPhrases, require_different_samples
from probes.cli.tables.location import draw_located, located_json, show_located
from probes.recipes.early_checks import require_refusals
from safe_decode.cli.command import command
from safe_decode.cli.console import print_json, require_place
from safe_decode.cli.options import JsonOptions, ModelOptions

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.location.locate import LocateConfig
    from probes.location.prompt_files import LocationData, PromptFile
    from probes.location.units import Ranking, UnitSet
    from probes.rollouts.generate import RolloutConfig
    from safe_decode.loading import Loaded

__all__ = ["locate"]

_MIN_REFUSALS = 50  # fewer distinct texts hardly have a variance to score
_SEARCHED = 1 / 3  # of the prompts, when ratios are searched


@dataclass(frozen=True, kw_only=True)
class LocateOptions(ModelOptions, JsonOptions):
    """Options of `safe-decode locate`."""

    harmful: Annotated[
        Path,
        typer.Option(help="Harmful prompts as JSON lines, with or without the model's responses."),
    ]
    benign: Annotated[
        Path,
        typer.Option(help="Benign prompts as JSON lines, with or without the model's responses."),
    ]
    out: Annotated[
        Path, typer.Option(help="File that the units are written to, in the format safetensors.")
    ]
    variant: Annotated[
        Literal["flap", "plain"],
        typer.Option(
            help="How heads are scored: flap squares the attention metric before heads are "
            "averaged; plain does not."
        ),
    ] = "flap"
    ranking: Annotated[
        Literal["joint", "separate"],
        typer.Option(help="Rank heads and neurons together (joint) or each kind alone (separate)."),
    ] = "joint"
    redundant: Annotated[
        float, typer.Option(help="Share of units that count as redundant (RU).")
    ] = 0.13
    safety: Annotated[
        float, typer.Option(help="Share of units that count as safety-critical (SCU).")
    ] = 0.02
    utility: Annotated[
        float, typer.Option(help="Share of units that count as utility-critical (UCU).")
    ] = 0.13
    refusal_phrase: RefusalPhrases = None
    samples: Annotated[
        int, typer.Option(min=1, help="Responses that are generated to each prompt.")
    ] = 1
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0, help="Temperature at which responses are sampled. 0: greedy decoding."
        ),
    ] = 0.0
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 128
    batch_size: BatchSize = 32
    seed: Annotated[
        int, typer.Option(help="Seed of the sampling and of the division of prompts.")
    ] = 0
    responses: Annotated[
        Path | None,
        typer.Option(
            help="Directory that harmful.jsonl and benign.jsonl are written to: the prompts with "
            "the model's responses. Given as --harmful and --benign, they spare the generation."
        ),
    ] = None
    search: Annotated[
        bool,
        typer.Option(
            help="Search the three shares on a third of the prompts that units are not located "
            "on; --redundant, --safety and --utility are then not used."
        ),
    ] = False
    kept: Annotated[
        Path | None,
        typer.Option(
            help="Directory that keeps finished work. A run that was interrupted goes on from it."
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(help="Directory that shares.png and importance.png are written to."),
    ] = None
    html: Annotated[
        Path | None,
        typer.Option(help="Write a self-contained page with tables and pictures to this file."),
    ] = None


@command("Make a probe")
def locate(options: LocateOptions) -> None:
    """Locate safety-critical, utility-critical, complex and redundant units of a model."""
    _require_sense(options)
    from probes.location.prompt_files import read_prompts

    config, sampling = _config(options), _sampling(options)
    files = {"harmful": read_prompts(options.harmful), "benign": read_prompts(options.benign)}
    require_refusals(
        files["harmful"],
        files["benign"],
        samples=options.samples,
        least=_MIN_REFUSALS,
        phrases=options.refusal_phrase or (),
    )
    loaded = options.load_model()
    said = _answers(loaded, files, sampling, options)
    if options.responses is not None:
        _write_responses(options.responses, said)
    units, data = _located(loaded, said, config, options)
    record = {
        "seen_groups": sorted({row.group for rows in said.values() for row in rows}),
        **_origin(loaded, options.model, files, data),
        "phrases": list(options.refusal_phrase or ()),
        "generation": _generation(files, sampling, options.samples),
    }
    units = replace(units, provenance={**units.provenance, **record})
    units.save(options.out)
    drawn = draw_located(units, plot=options.plot, html=options.html)
    if options.as_json:
        print_json(located_json(units, options.out))
    else:
        show_located(units, options.out, drawn)


def _require_sense(options: LocateOptions) -> None:
    """Check, before any work, what could only fail after it."""
    require_place(options.out)
    require_place(options.html)
    for folder in (options.responses, options.plot, options.kept):
        if folder is not None:
            require_place(folder / "file")
    require_different_samples(options.samples, options.temperature)
    if options.html is not None or options.plot is not None:
        from probes.reports.figures import require_plots

        require_plots()


def _config(options: LocateOptions) -> LocateConfig:
    from probes.location.locate import LocateConfig
    from probes.location.units import Ratios

    return LocateConfig(
        variant=options.variant,
        ranking=options.ranking,
        ratios=Ratios(redundant=options.redundant, safety=options.safety, utility=options.utility),
        min_refusals=_MIN_REFUSALS,
    )


def _sampling(options: LocateOptions) -> RolloutConfig:
    from probes.rollouts.generate import RolloutConfig

    return RolloutConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        temperature=options.temperature or 1.0,
        seed=options.seed,
        batch_size=options.batch_size,
    )


def _answers(
    loaded: Loaded,
    files: Mapping[str, PromptFile],
    sampling: RolloutConfig,
    options: LocateOptions,
) -> dict[str, list[Conversation]]:
    """Let the model answer the prompts that have no response yet."""
    from probes.location.kept_answers import kept_answers
    from probes.location.prompt_files import answered

    samples, said = options.samples, {}
    for name, file in files.items():
        answer = partial(
            answered, loaded.model, loaded.tokenizer, file, samples=samples, config=sampling
        )
        made_of = {"digest": file.digest, "samples": samples, **asdict(sampling)}
        said[name] = kept_answers(options.kept, name, made_of, answer)
    return said


def _located(
    loaded: Loaded,
    said: Mapping[str, Sequence[Conversation]],
    config: LocateConfig,
    options: LocateOptions,
) -> tuple[UnitSet, LocationData]:
    """Locate units, with shares searched on other prompts where that was asked for."""
    from probes.analysis.ratio_search import apart
    from probes.location.locate import locate as locate_units
    from probes.location.prompt_files import location_data

    phrases = tuple(options.refusal_phrase or ())
    parts = {
        name: apart(rows, share=_SEARCHED if options.search else 0, seed=options.seed)
        for name, rows in said.items()
    }
    (harmful, other_harmful), (benign, other_benign) = parts["harmful"], parts["benign"]
    data = location_data(harmful, benign, min_refusals=_MIN_REFUSALS, phrases=phrases)
    units = locate_units(
        loaded.model,
        loaded.tokenizer,
        data.refusals,
        data.benign,
        config,
        kept=options.kept,
    )
    if options.search:
        others = location_data(other_harmful, other_benign, min_refusals=1, phrases=phrases)
        units = _with_searched_ratios(loaded, units, data, others, other_harmful, options.ranking)
    return units, data


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
