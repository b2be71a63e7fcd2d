"""How stable a located set is: across calibration data, its amount, and the metric.

Two locations on disjoint halves of the data must name much the same units, or the set says
more about the sample than about the model. IoU is compared with that of sets drawn by lot
with the same numbers in every layer and kind.

Knows splits, sizes, variants and comparisons. Does not know what removal does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from probes.data.conversations import Conversation
from probes.location.locate import LocateConfig, locate
from probes.location.random_sets import chance_iou, iou
from probes.location.units import CATEGORIES, Category, UnitSet
from safe_decode.errors import DataError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["StabilityReport", "stability"]

_SIZES = (0.125, 0.25, 0.5)
_SMALLEST_PART = 10


@dataclass(frozen=True)
class StabilityReport:
    """How far two locations agree on one category.

    Attributes:
        compared: What differs between the two.
        category: Of the units compared.
        iou: Common units over all units of both.
        chance: Mean IoU of sets drawn by lot.
        chance_high: Their 95th percentile.
        n_first: Units of the first set.
        n_second: Units of the second set.
    """

    compared: str
    category: Category
    iou: float
    chance: float
    chance_high: float
    n_first: int
    n_second: int


def stability(
    model: CausalLM,
    tokenizer: Tokenizer,
    refusals: Sequence[Conversation],
    benign: Sequence[Conversation],
    config: LocateConfig | None = None,
    *,
    seed: int = 0,
) -> Iterator[StabilityReport]:
    """Locate on halves, on fewer responses and with the other choices, and compare.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        refusals: See `locate.locate`; halves are disjoint by group.
        benign: Benign responses, divided in the same way.
        config: The choices that the comparison starts from.
        seed: Of the halves.

    Raises:
        DataError: Too few groups to halve.
    """
    # Parts of the data are smaller by design, so the floor on refusals is lowered for them.
    config = replace(config or LocateConfig(), min_refusals=2)
    halves = list(zip(_halves(refusals, seed), _halves(benign, seed), strict=True))
    first, second = (locate(model, tokenizer, half[0], half[1], config) for half in halves)
    yield from _agreements("disjoint halves", first, second)
    full = locate(model, tokenizer, refusals, benign, config)
    for share in _SIZES:
        part = [_part(rows, share, seed) for rows in (refusals, benign)]
        if min(map(len, part)) >= _SMALLEST_PART:
            some = locate(model, tokenizer, part[0], part[1], config)
            yield from _agreements(f"{share:.1%} of the data, all of it", some, full)
    other = replace(config, variant="plain" if config.variant == "flap" else "flap")
    yield from _agreements("flap, plain", full, locate(model, tokenizer, refusals, benign, other))
    apart = replace(config, ranking="separate" if config.ranking == "joint" else "joint")
    yield from _agreements(
        "ranked jointly, separately", full, locate(model, tokenizer, refusals, benign, apart)
    )


def _agreements(compared: str, first: UnitSet, second: UnitSet) -> Iterator[StabilityReport]:
    for category in CATEGORIES:
        one, two = first.only(category), second.only(category)
        if len(one) or len(two):
            chance = chance_iou(one, two, first)
            yield StabilityReport(
                compared, category, iou(one, two), chance.mean, chance.high, len(one), len(two)
            )


def _halves(rows: Sequence[Conversation], seed: int) -> list[list[Conversation]]:
    groups = sorted({row.group for row in rows})
    if len(groups) < 2:
        raise DataError(f"{len(groups)} groups cannot be halved; give responses to more prompts.")
    order = np.random.default_rng(seed).permutation(len(groups))
    first = {groups[index] for index in order[: len(groups) // 2]}
    inside = [row for row in rows if row.group in first]
    return [inside, [row for row in rows if row.group not in first]]


def _part(rows: Sequence[Conversation], share: float, seed: int) -> list[Conversation]:
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[index] for index in sorted(order[: round(share * len(rows))])]
