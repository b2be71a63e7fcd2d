"""`safe-decode ablate`: what a model does without some of its units, beside random sets.

Knows the options, the order of the work and how the outcome is shown. Does not know how
units are removed or drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from probes.cli.options import BatchSize, JournalPath, RefusalPhrases
from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json, progress, require_place, working
from safe_decode.cli.options import JsonOptions, ModelOptions
from safe_decode.cli.tables import WordTable, print_table
from safe_decode.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from probes.analysis.ablation import AblationConfig, AblationData, AblationResult, Rise
    from probes.location.units import UnitSet
    from probes.rollouts.types import Request
    from safe_decode.loading import Loaded

__all__ = ["ablate"]


@dataclass(frozen=True, kw_only=True)
class AblateOptions(ModelOptions, JsonOptions):
    """Options of `safe-decode ablate`."""

    units: Annotated[
        Path,
        typer.Option(help="File of units located on this model, written by `safe-decode locate`."),
    ]
    harmful: Annotated[
        Path | None,
        typer.Option(
            help="Harmful prompts as JSON lines. Without it: prompts of the embedded world."
        ),
    ] = None
    benign: Annotated[
        Path | None,
        typer.Option(
            help="Benign prompts as JSON lines. Without it: prompts of the embedded world."
        ),
    ] = None
    category: Annotated[
        Literal["SCU", "UCU", "RU", "CU"],
        typer.Option(
            help="Which units are removed: safety-critical (SCU), utility-critical (UCU), "
            "redundant (RU) or complex (CU)."
        ),
    ] = "SCU"
    fill: Annotated[
        Literal["zero", "mean"],
        typer.Option(help="What removed channels are set to: zero, or their mean over answers."),
    ] = "zero"
    random_sets: Annotated[
        int,
        typer.Option(min=1, help="Random sets of units, of each match, that answer in full."),
    ] = 19
    margin_sets: Annotated[
        int,
        typer.Option(min=1, help="Random sets of units whose first-token margin is measured."),
    ] = 99
    prompts: Annotated[
        int,
        typer.Option(
            min=1,
            help="Largest number of harmful and of benign prompts; the first of each are used.",
        ),
    ] = 200
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 96
    batch_size: BatchSize = 128
    refusal_phrase: RefusalPhrases = None
    seed: Annotated[
        int, typer.Option(help="Seed of the random sets and of the embedded world's prompts.")
    ] = 0
    out: JournalPath = None
    plot: Annotated[Path | None, typer.Option(help="Draw the arms to this PNG file.")] = None


@command("Evaluate")
def ablate(options: AblateOptions) -> None:
    """Remove units, let the model answer, and compare with random sets of units."""
    for path in (options.out, options.plot):
        require_place(path)
    if options.plot is not None:
        from probes.reports.figures import require_plots

        require_plots()
    from probes.analysis.ablation import rise
    from probes.location.units import UnitSet

    located, config, category = UnitSet.load(options.units), _config(options), options.category
    loaded = options.load_model()
    _require_fit(located, loaded)
    asked = _asked(options, loaded, located)
    data = _data(options, loaded, asked, config)
    identity = _identity(loaded, located, asked, config)
    measured = _measured(loaded, located, data, config, options.out, identity)
    compared = rise(measured, category)
    if options.plot is not None:
        from probes.reports.study_plots import draw_ablation

        draw_ablation(measured, category, options.plot)
    if options.as_json:
        arms = [row.to_json() for row in measured]
        print_json({**identity, "arms": arms, "compared": [asdict(row) for row in compared]})
    else:
        _show(measured, compared, category)


def _config(options: AblateOptions) -> AblationConfig:
    from probes.analysis.ablation import AblationConfig
    from probes.rollouts.generate import RolloutConfig

    generation = RolloutConfig(max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
    return AblationConfig(
        category=options.category,
        fill=options.fill,
        random_sets=options.random_sets,
        margin_sets=options.margin_sets,
        seed=options.seed,
        generation=generation,
    )


def _require_fit(units: UnitSet, loaded: Loaded) -> None:
    """Refuse units that were located on another model; those without a record are trusted."""
    from safe_decode.bundle.fingerprint import Fingerprint

    stored = units.provenance.get("fingerprint")
    if stored is not None:
        # JSON knows lists alone.
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()
        }
        Fingerprint(**fields).require(Fingerprint.of(loaded.model, loaded.tokenizer))


def _asked(options: AblateOptions, loaded: Loaded, units: UnitSet) -> dict[str, list[Request]]:
    """Gather prompts that were neither located nor searched on."""
    harmful, benign, prompts = options.harmful, options.benign, options.prompts
    if (harmful is None) != (benign is None) or (harmful is None and options.model is not None):
        raise ConfigurationError(
            "--harmful and --benign belong together, and a --model of your own needs both; pass "
            "two files of prompts."
        )
    seen = set(units.provenance.get("seen_groups", ()))
    if harmful is None or benign is None:
        from probes.organism.draws import Draw
        from probes.organism.prompts_source import world_requests

        draws = {
            "harmful": Draw(situation="harmful", count=prompts),
            "benign": Draw(situation="benign", count=prompts),
        }
        return {
            name: world_requests(loaded.tokenizer, one, seed=options.seed + 7_000, unlike=seen)
            for name, one in draws.items()
        }
    from probes.location.prompt_files import read_prompts

    found = {}
    for name, path in (("harmful", harmful), ("benign", benign)):
        fresh = [row for row in read_prompts(path, split="test").asked() if row.group not in seen]
        if not fresh:
            raise DataError(
                f"{path} holds no prompt that was not located on; pass others, so that what is "
                "reported is not what was searched."
            )
        found[name] = fresh[:prompts]
    return found


def _data(
    options: AblateOptions,
    loaded: Loaded,
    asked: dict[str, list[Request]],
    config: AblationConfig,
) -> AblationData:
    """Let the whole model answer first: for first tokens, perplexity and means."""
    from probes.analysis.ablation import AblationData
    from probes.analysis.behaviour import refusal_first_tokens, words_judge
    from probes.location.locate import channel_moments
    from probes.organism.prompts_source import world_judge
    from probes.rollouts.generate import rollout

    model, tokenizer = loaded.model, loaded.tokenizer
    phrases = tuple(options.refusal_phrase or ())
    judges = {
        name: world_judge
        if options.harmful is None
        else words_judge(harmful_prompts=harm, phrases=phrases)
        for name, harm in (("harmful", True), ("benign", False))
    }
    said = {
        name: rollout(model, tokenizer, rows, judge=judges[name], config=config.generation)
        for name, rows in asked.items()
    }
    refusals = [row for row in said["harmful"] if row.refusal]
    answers = [row for row in said["benign"] if row.meta["label"] == "benign"]
    return AblationData(
        harmful=asked["harmful"],
        benign=asked["benign"],
        answers=answers,
        harm_judge=judges["harmful"],
        benign_judge=judges["benign"],
        refusal_tokens=refusal_first_tokens(tokenizer, refusals, answers),
        means=channel_moments(model, tokenizer, answers) if config.fill == "mean" else (),
    )


def _identity(
    loaded: Loaded, units: UnitSet, asked: dict[str, list[Request]], config: AblationConfig
) -> dict[str, Any]:
    import hashlib

    from safe_decode.bundle.fingerprint import Fingerprint

    fingerprint = asdict(Fingerprint.of(loaded.model, loaded.tokenizer))
    groups = [row.group for rows in asked.values() for row in rows]
    digest = hashlib.blake2b(digest_size=8)
    for part in (units.category, units.layer, units.kind, units.index):
        digest.update(part.tobytes())
    return {
        "fingerprint": hashlib.blake2b(repr(fingerprint).encode(), digest_size=8).hexdigest(),
        "units": digest.hexdigest(),
        "prompts": hashlib.blake2b("".join(groups).encode(), digest_size=8).hexdigest(),
        "config": asdict(config),
    }


def _measured(
    loaded: Loaded,
    units: UnitSet,
    data: AblationData,
    config: AblationConfig,
    out: Path | None,
    identity: dict[str, Any],
) -> list[AblationResult]:
    from probes.analysis.ablation import AblationResult, arms_of
    from probes.analysis.ablation import ablate as ablate_arm
    from probes.runs.journal import Journal

    arms = list(arms_of(units, config))
    with working("Reading what is done"):
        journal = None if out is None else Journal(out, identity)
    found = []
    with progress("removing", len(arms)) as tick:
        for arm in arms:
            if journal is not None and arm.name in journal:
                found.append(AblationResult.from_json(journal.rows[arm.name]))
            else:
                found.append(ablate_arm(loaded.model, loaded.tokenizer, arm, data, config))
                if journal is not None:
                    journal.add(arm.name, found[-1].to_json())
            tick(1)
    return found


def _show(measured: Sequence[AblationResult], compared: Sequence[Rise], category: str) -> None:
    numbers = ("units", "refusal", "harmful", "broken", "benign kept", "perplexity", "margin")
    rows = []
    for row in measured:
        if row.family.startswith("random") or row.harmful is None:
            continue
        shares = [f"{row.harmful.share(n).point:.1%}" for n in ("refusal", "harmful", "broken")]
        kept = "–" if row.benign is None else f"{row.benign.share('benign').point:.1%}"
        removed = "nothing" if row.family == "whole" else row.name
        surprise = "–" if row.perplexity is None else f"{row.perplexity:.2f}"
        rows.append([removed, str(row.n_units), *shares, kept, surprise, f"{row.margin:.2f}"])
    print_table(WordTable(("removed", *numbers), rows, "Without these units", right=numbers))
    screen = console()
    for found in compared:
        screen.print(_told(found, category), soft_wrap=True)


def _told(found: Rise, category: str) -> str:
    median, high, _ = found.random_points
    surprise, margin = found.random_perplexity_ratio[0], found.random_margin_fall[0]
    return (
        f"{category} against {found.sets} sets {found.family}: "
        f"harmful {found.harmful_points:+.1f} points against {median:+.1f} "
        f"(95th percentile {high:+.1f}, p = {found.p_harmful:.2f}); "
        f"perplexity x{found.perplexity_ratio:.2f} against x{surprise:.2f}; "
        f"margin falls {found.margin_fall:.2f} against {margin:.2f} of {found.margin_sets} sets "
        f"(p = {found.p_margin:.2f})"
    )
