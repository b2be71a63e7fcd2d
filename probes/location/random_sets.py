"""Random sets of units to compare a located set with, and how alike two sets are.

A located set says something only beside sets of its own size, layers and kinds that were
drawn by lot; and beside sets that, on top, are as important overall, since removing any
important unit hurts.

Knows units, strata and draws. Does not know models or what is measured on the sets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from probes.location.units import CATEGORIES, Category, UnitSet
from safe_decode.errors import ConfigurationError

__all__ = ["ChanceIoU", "Match", "chance_iou", "iou", "matched_draws", "top_units"]

Match = Literal["layer", "importance"]
"""layer: as many units of each layer and kind. importance: and, within these, of like rank
by I_S + I_U."""

_QUANTILES = 10


def matched_draws(
    units: UnitSet,
    category: Category = "SCU",
    *,
    match: Match = "layer",
    count: int,
    seed: int,
) -> list[UnitSet]:
    """Draw sets of units that are not of a category, matched to those that are.

    Where a layer has too few others (a handful of heads, most of them in the category), the
    category's own are drawn as well; a set's size is always kept.

    Args:
        units: All units of a model.
        category: What is matched.
        match: See `Match`.
        count: Sets.
        seed: Of the lot.

    Returns:
        `count` sets, drawn independently, without replacement within a set.

    Raises:
        ConfigurationError: Unknown match.
    """
    if match not in get_args(Match):
        raise ConfigurationError(f"match={match!r} is not one of {get_args(Match)}; pass one.")
    rng = np.random.default_rng(seed)
    wanted = units.category == CATEGORIES.index(category)
    strata = _strata(units)
    ranks = _ranks_within(strata, units.i_s.astype(np.float64) + units.i_u)
    return [units.take(_one_draw(rng, wanted, strata, ranks, match)) for _ in range(count)]


def top_units(units: UnitSet, size: int, *, by: Literal["i_s", "utility"] = "i_s") -> UnitSet:
    """Keep the `size` units of largest I_S, or of largest I_U - I_S."""
    key = units.i_s if by == "i_s" else units.i_u.astype(np.float64) - units.i_s
    return units.take(np.sort(np.argsort(-key, kind="stable")[:size]))


def iou(first: UnitSet, second: UnitSet) -> float:
    """Return the share of common units among all units of two sets; 1 of two empty sets."""
    one, two = _names(first), _names(second)
    return len(one & two) / len(one | two) if one | two else 1.0


@dataclass(frozen=True)
class ChanceIoU:
    """What two sets share that were drawn by lot with the layers and kinds of two others.

    Attributes:
        mean: Over the draws.
        high: Their 95th percentile.
    """

    mean: float
    high: float


def chance_iou(
    first: UnitSet, second: UnitSet, everything: UnitSet, *, draws: int = 200, seed: int = 0
) -> ChanceIoU:
    """Draw pairs of sets of the same numbers in each layer and kind, and compare them."""
    rng = np.random.default_rng(seed)
    strata = _strata(everything)
    both = [
        replace(everything, category=_as_category(everything, part)) for part in (first, second)
    ]
    chosen = [part.category == CATEGORIES.index("SCU") for part in both]
    shared = np.zeros(draws)
    for draw in range(draws):
        sets = []
        for wanted in chosen:
            picked = np.zeros(len(everything), dtype=bool)
            for name in np.unique(strata):
                pool = np.flatnonzero(strata == name)
                size = int(wanted[pool].sum())
                picked[rng.choice(pool, size, replace=False)] = True
            sets.append(picked)
        union = int((sets[0] | sets[1]).sum())
        shared[draw] = int((sets[0] & sets[1]).sum()) / union if union else 1.0
    return ChanceIoU(float(shared.mean()), float(np.quantile(shared, 0.95)))


def _as_category(everything: UnitSet, part: UnitSet) -> NDArray[np.uint8]:
    names = _names(part)
    own = zip(everything.layer, everything.kind, everything.index, strict=True)
    inside = np.fromiter((tuple(map(int, unit)) in names for unit in own), bool, len(everything))
    return np.where(inside, CATEGORIES.index("SCU"), CATEGORIES.index("CU")).astype(np.uint8)


def _one_draw(
    rng: np.random.Generator,
    wanted: NDArray[np.bool_],
    strata: NDArray[np.int64],
    ranks: NDArray[np.float64],
    match: Match,
) -> NDArray[np.intp]:
    taken = np.zeros(len(wanted), dtype=bool)
    for unit in rng.permutation(np.flatnonzero(wanted)):
        here = (strata == strata[unit]) & ~taken
        pool = np.flatnonzero(here & ~wanted)
        if not len(pool):
            pool = np.flatnonzero(here)
        if match == "importance":
            # The nearest by rank: a tenth of the stratum, or the nearest one of a few.
            near = np.argsort(np.abs(ranks[pool] - ranks[unit]), kind="stable")
            pool = pool[near[: max(1, len(pool) // _QUANTILES)]]
        taken[rng.choice(pool)] = True
    return np.flatnonzero(taken)


def _strata(units: UnitSet) -> NDArray[np.int64]:
    return units.layer.astype(np.int64) * 2 + units.kind


def _ranks_within(strata: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank values from 0 to 1 within each stratum."""
    ranks = np.zeros(len(values))
    for name in np.unique(strata):
        rows = np.flatnonzero(strata == name)
        order = np.argsort(np.argsort(values[rows], kind="stable"), kind="stable")
        ranks[rows] = order / max(len(rows) - 1, 1)
    return ranks


def _names(units: UnitSet) -> set[tuple[int, int, int]]:
    own = zip(units.layer, units.kind, units.index, strict=True)
    return {(int(layer), int(kind), int(index)) for layer, kind, index in own}
