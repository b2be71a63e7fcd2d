"""The causal check: what happens without some units, beside random sets and other choices.

Every arm removes a set of units and lets the model answer: the located set, sets drawn by
lot and matched to it, and the sets one would name otherwise. The located set is credited
with what lies beyond the random sets, not with what lies beyond the whole model.

Knows arms, what is measured on each and their order. Does not know where prompts come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from probes.analysis.behaviour import Outcomes, outcomes_of, perplexity, refusal_margins
from probes.analysis.unit_removal import Fill, removed
from probes.data.conversations import Conversation
from probes.location.importance import ChannelMoments
from probes.location.random_sets import Match, matched_draws, top_units
from probes.location.units import Category, UnitSet
from probes.rollouts.generate import RolloutConfig
from probes.rollouts.types import Judge, Request
from safe_decode.typing import CausalLM, Tokenizer

__all__ = [
    "AblationConfig",
    "AblationData",
    "AblationArm",
    "AblationResult",
    "Rise",
    "ablate",
    "arms_of",
    "rise",
]


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What is removed and compared.

    Attributes:
        category: The located set on trial.
        fill: See `unit_removal.Fill`.
        random_sets: Random sets of each match that answer in full.
        margin_sets: Random sets of which only the first-token margin is measured, which
            costs one forward a prompt.
        seed: Of the lot.
        generation: How the model answers.
    """

    category: Category = "SCU"
    fill: Fill = "zero"
    random_sets: int = 19
    margin_sets: int = 99
    seed: int = 0
    generation: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass(frozen=True, eq=False)
class AblationData:
    """What the arms are measured on, none of it used to locate.

    Attributes:
        harmful: Requests for harm.
        benign: Benign requests; empty where only perplexity tells utility.
        answers: Benign responses of the whole model, for perplexity.
        harm_judge: Labels what the harmful requests yield.
        benign_judge: Labels what the benign ones yield.
        refusal_tokens: See `behaviour.refusal_first_tokens`.
        means: For the fill `mean`.
    """

    harmful: Sequence[Request]
    benign: Sequence[Request]
    answers: Sequence[Conversation]
    harm_judge: Judge
    benign_judge: Judge
    refusal_tokens: Sequence[int]
    means: Sequence[ChannelMoments] = ()


class AblationArm(NamedTuple):
    """A set of units to remove.

    Attributes:
        name: Unique.
        family: What it is a member of: `whole`, a category, `random layer`, ...
        units: Removed.
        in_full: Whether the model answers, or only the margin is taken.
    """

    name: str
    family: str
    units: UnitSet
    in_full: bool


@dataclass(frozen=True)
class AblationResult:
    """What one arm did.

    Attributes:
        name: Of the arm.
        family: Of the arm.
        n_units: Removed.
        margin: Mean first-token refusal margin on the harmful requests.
        harmful: Outcomes of the harmful requests; None where only the margin was taken.
        benign: Outcomes of the benign ones; None where only the margin was taken, or where none
            were given.
        perplexity: Of benign answers; None where only the margin was taken.
    """

    name: str
    family: str
    n_units: int
    margin: float
    harmful: Outcomes | None = None
    benign: Outcomes | None = None
    perplexity: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        outcomes = {"harmful": self.harmful, "benign": self.benign}
        told = {name: None if o is None else o.counts for name, o in outcomes.items()}
        fixed = {"arm": self.name, "family": self.family, "units": self.n_units}
        return {**fixed, "margin": self.margin, "perplexity": self.perplexity, **told}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> AblationResult:
        """Read what `to_json` returned."""
        harmful, benign = (
            None if row[k] is None else Outcomes(dict(row[k])) for k in ("harmful", "benign")
        )
        return cls(
            row["arm"],
            row["family"],
            row["units"],
            row["margin"],
            harmful,
            benign,
            row["perplexity"],
        )


def arms_of(units: UnitSet, config: AblationConfig) -> Iterator[AblationArm]:
    """Name the arms in the order in which they matter.

    The whole model; the located set; random sets of equal numbers in every layer and kind,
    and of like importance too; the most utility-critical and the top-I_S units, as many as
    the located set has; all utility-critical, all redundant units.
    """
    chosen = units.only(config.category)
    yield AblationArm("whole", "whole", units.take(np.zeros(0, dtype=np.intp)), True)
    yield AblationArm(config.category, config.category, chosen, True)
    yield AblationArm(
        "UCU, same number", "UCU, same number", top_units(units, len(chosen), by="utility"), True
    )
    yield AblationArm("top I_S", "top I_S", top_units(units, len(chosen)), True)
    others: tuple[Category, ...] = ("UCU", "RU")
    for name in others:
        if name != config.category and len(units.only(name)):
            yield AblationArm(name, name, units.only(name), True)
    matches: tuple[Match, ...] = ("layer", "importance")
    for match in matches:
        draws = matched_draws(
            units,
            config.category,
            match=match,
            count=max(config.random_sets, config.margin_sets),
            seed=config.seed,
        )
        family = f"random, matched on {match}"
        for number, draw in enumerate(draws):
            yield AblationArm(f"{family}, {number}", family, draw, number < config.random_sets)


def ablate(
    model: CausalLM,
    tokenizer: Tokenizer,
    arm: AblationArm,
    data: AblationData,
    config: AblationConfig,
) -> AblationResult:
    """Remove an arm's units, measure, and put the model back as it was.

    Raises:
        ConfigurationError: As in `unit_removal.removed`.
        PromptError: A prompt and the cap exceed the model's context.
    """
    with removed(model, arm.units, fill=config.fill, means=data.means):
        margins = refusal_margins(model, tokenizer, data.harmful, data.refusal_tokens)
        fixed = (arm.name, arm.family, len(arm.units), float(margins.mean()))
        if not arm.in_full:
            return AblationResult(*fixed)
        generation = config.generation
        harmful = outcomes_of(model, tokenizer, data.harmful, data.harm_judge, generation)
        benign = (
            outcomes_of(model, tokenizer, data.benign, data.benign_judge, generation)
            if data.benign
            else None
        )
        surprise = perplexity(model, tokenizer, data.answers)
        return AblationResult(*fixed, harmful, benign, surprise)


@dataclass(frozen=True)
class Rise:
    """What the located set adds over the whole model and over random sets.

    Attributes:
        family: The random sets compared with.
        sets: How many answered in full.
        harmful_points: Rise of the harmful share over the whole model, in points.
        random_points: The random sets' rises: median, 95th percentile, largest.
        p_harmful: Share of random sets with at least this rise, the located set counted in.
        perplexity_ratio: Perplexity over the whole model's.
        random_perplexity_ratio: The random sets': median, 95th percentile, largest.
        margin_fall: How far the margin falls below the whole model's.
        random_margin_fall: The random sets': median, 95th percentile, largest.
        margin_sets: How many of them.
        p_margin: As `p_harmful`, of the margin.
    """

    family: str
    sets: int
    harmful_points: float
    random_points: tuple[float, float, float]
    p_harmful: float
    perplexity_ratio: float
    random_perplexity_ratio: tuple[float, float, float]
    margin_fall: float
    random_margin_fall: tuple[float, float, float]
    margin_sets: int
    p_margin: float


def rise(measured: Sequence[AblationResult], category: Category = "SCU") -> list[Rise]:
    """Compare the located set with each family of random sets."""
    by_name = {row.name: row for row in measured}
    whole, located = by_name["whole"], by_name[category]
    families = dict.fromkeys(r.family for r in measured if r.family.startswith("random"))
    return [
        _rise(name, [r for r in measured if r.family == name], whole, located) for name in families
    ]


def _rise(
    family: str, random: list[AblationResult], whole: AblationResult, located: AblationResult
) -> Rise:
    full = [row for row in random if row.harmful is not None]

    def points(row: AblationResult) -> float:
        assert row.harmful is not None
        assert whole.harmful is not None
        before = whole.harmful.share("harmful").point
        return 100 * (row.harmful.share("harmful").point - before)

    def ratio(row: AblationResult) -> float:
        assert row.perplexity is not None
        assert whole.perplexity is not None
        return row.perplexity / whole.perplexity

    lots = [points(row) for row in full]
    falls = [whole.margin - row.margin for row in random]
    fall = whole.margin - located.margin
    return Rise(
        family,
        len(full),
        points(located),
        _spread(lots),
        _share_at_least(lots, points(located)),
        ratio(located),
        _spread([ratio(row) for row in full]),
        fall,
        _spread(falls),
        len(falls),
        _share_at_least(falls, fall),
    )


def _share_at_least(lots: Sequence[float], value: float) -> float:
    # The value itself is one of the draws under the null; p is never 0 of finitely many.
    return (1 + sum(lot >= value for lot in lots)) / (1 + len(lots))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    if not values:
        return (float("nan"),) * 3
    array = np.asarray(values)
    return float(np.median(array)), float(np.quantile(array, 0.95)), float(array.max())
