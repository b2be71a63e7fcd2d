"""Search the shares of the categories on prompts that are neither located nor reported on.

The paper searches ratios downwards and gives no threshold; ours, all measured on the search
prompts with the first-token refusal margin and the perplexity of benign answers:

1. RU: the largest share whose removal leaves both about steady;
2. SCU: of what is left, the largest share whose removal lowers the margin by more than the
   95th percentile of random sets of the same layers and kinds, while perplexity stays about
   steady;
3. UCU: of what is left, the largest share whose removal raises perplexity by more than that
   percentile, while the margin stays about steady.

"About steady": perplexity rises by at most `utility_tolerance` of itself, the margin falls
by at most `margin_tolerance` (nats). Where no share passes, the category is left empty and
the record says so.

Knows candidates, thresholds and their order. Does not know files or who answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from probes.analysis.behaviour import perplexity, refusal_margins
from probes.analysis.unit_removal import removed
from probes.data.conversations import Conversation
from probes.location.random_sets import matched_draws
from probes.location.units import Category, Ranking, Ratios, UnitScores, UnitSet, assign
from probes.rollouts.types import Request
from probes.runs.progress import progress
from safe_decode.errors import ConfigurationError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["RatioSearch", "SearchConfig", "SearchData", "apart", "search_ratios"]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is tried, and when it passes.

    Attributes:
        redundant: Shares of RU to try.
        safety: Shares of SCU to try.
        utility: Shares of UCU to try.
        utility_tolerance: Rise of perplexity that is still steady, as a share of it.
        margin_tolerance: Fall of the refusal margin that is still steady, in nats.
        random_sets: Draws for the 95th percentile.
        seed: Of the draws.
    """

    redundant: tuple[float, ...] = (0.30, 0.20, 0.15, 0.10, 0.05)
    safety: tuple[float, ...] = (0.10, 0.07, 0.05, 0.03, 0.02, 0.015, 0.01, 0.005)
    utility: tuple[float, ...] = (0.20, 0.15, 0.10, 0.05, 0.02)
    utility_tolerance: float = 0.05
    margin_tolerance: float = 0.5
    random_sets: int = 19
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.utility_tolerance, self.margin_tolerance) < 0 or self.random_sets < 1:
            raise ConfigurationError(
                f"utility_tolerance={self.utility_tolerance} and margin_tolerance="
                f"{self.margin_tolerance} must be >= 0, random_sets={self.random_sets} >= 1."
            )


@dataclass(frozen=True, eq=False)
class SearchData:
    """Prompts of the search alone.

    Attributes:
        harmful: Requests for harm.
        answers: Benign responses of the model.
        refusal_tokens: See `behaviour.refusal_first_tokens`.
    """

    harmful: Sequence[Request]
    answers: Sequence[Conversation]
    refusal_tokens: Sequence[int]


@dataclass(frozen=True)
class RatioSearch:
    """What was found.

    Attributes:
        ratios: The shares that passed, 0 where none did.
        tried: JSON, one entry a set that was removed.
    """

    ratios: Ratios
    tried: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record for provenance."""
        return {"ratios": asdict(self.ratios), "tried": list(self.tried)}


class _Effect(NamedTuple):
    margin_fall: float
    perplexity_rise: float


def search_ratios(
    model: CausalLM,
    tokenizer: Tokenizer,
    scores: UnitScores,
    data: SearchData,
    config: SearchConfig | None = None,
    *,
    ranking: Ranking = "joint",
) -> RatioSearch:
    """Search RU, then SCU, then UCU, each downwards from the largest share.

    Args:
        model: On which the scores were taken, in eval mode.
        tokenizer: Its tokenizer.
        scores: Of every unit.
        data: Disjoint from what was located on and from what is reported.
        config: See `SearchConfig`.
        ranking: See `location.units.Ranking`.
    """
    config = config or SearchConfig()
    search = _Search(model, tokenizer, scores, data, config, ranking)
    with progress("searching ratios", 3) as advance:
        for category in ("RU", "SCU", "UCU"):
            search.settle(category)
            advance(1)
    return RatioSearch(search.ratios, tuple(search.tried))


class _Search:
    """The state of one search."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        scores: UnitScores,
        data: SearchData,
        config: SearchConfig,
        ranking: Ranking,
    ) -> None:
        self.model, self.tokenizer, self.scores = model, tokenizer, scores
        self.data, self.config, self.ranking = data, config, ranking
        self.ratios = Ratios(redundant=0, safety=0, utility=0)
        self.tried: list[dict[str, Any]] = []
        self.whole = self._measure(None)

    def settle(self, category: Category) -> None:
        """Keep the largest share of a category that passes."""
        for ratios, share in self._candidates(category):
            units = assign(self.scores, ratios, ranking=self.ranking)
            chosen = units.only(category)
            if not len(chosen):
                continue
            effect, bar = self._effect(chosen), None
            steady = self._steady(category, effect)
            if steady and category != "RU":
                bar = self._bar(units, category)
            passed = steady and (bar is None or self._hurt(category, effect) > bar)
            self.tried.append(
                {
                    "category": category,
                    "share": share,
                    "units": len(chosen),
                    **effect._asdict(),
                    "random_95": bar,
                    "passed": passed,
                }
            )
            if passed:
                self.ratios = ratios
                return

    def _candidates(self, category: Category) -> Iterator[tuple[Ratios, float]]:
        names = {"RU": "redundant", "SCU": "safety", "UCU": "utility"}
        name = names[category]
        for share in sorted(getattr(self.config, name), reverse=True):
            yield replace(self.ratios, **{name: share}), share

    def _steady(self, category: Category, effect: _Effect) -> bool:
        same_utility = effect.perplexity_rise <= self.config.utility_tolerance
        same_margin = effect.margin_fall <= self.config.margin_tolerance
        wanted = {"RU": same_utility and same_margin, "SCU": same_utility, "UCU": same_margin}
        return wanted[category]

    def _hurt(self, category: Category, effect: _Effect) -> float:
        return effect.margin_fall if category == "SCU" else effect.perplexity_rise

    def _bar(self, units: UnitSet, category: Category) -> float:
        """Return the 95th percentile of what random sets do."""
        draws = matched_draws(units, category, count=self.config.random_sets, seed=self.config.seed)
        hurts = [self._hurt(category, self._effect(draw)) for draw in draws]
        return float(np.quantile(hurts, 0.95))

    def _effect(self, units: UnitSet) -> _Effect:
        margin, surprise = self._measure(units)
        return _Effect(self.whole[0] - margin, surprise / self.whole[1] - 1)

    def _measure(self, units: UnitSet | None) -> tuple[float, float]:
        everything = units if units is not None else _nothing(self.scores)
        data = self.data
        with removed(self.model, everything):
            margins = refusal_margins(self.model, self.tokenizer, data.harmful, data.refusal_tokens)
            return float(margins.mean()), perplexity(self.model, self.tokenizer, data.answers)


def _nothing(scores: UnitScores) -> UnitSet:
    return assign(scores, Ratios()).take(np.zeros(0, dtype=np.intp))


def apart(
    rows: Sequence[Conversation], *, share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Split responses by group into those to locate on and those to search on."""
    groups = sorted({row.group for row in rows})
    order = np.random.default_rng(seed).permutation(len(groups))
    searched = {groups[index] for index in order[: round(share * len(groups))]}
    located = [row for row in rows if row.group not in searched]
    return located, [row for row in rows if row.group in searched]
