"""From rows as they come to the five splits that everything downstream trusts.

Knows the order: judge nothing, merge near duplicates, assign, balance, report. What a near
duplicate is, is known to `near_duplicates`; what balance is, to `balance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probes.data.balance import cell_shares, rebalanced, short_cells
from probes.data.conversations import (
    DEFAULT_SHARES,
    SPLITS,
    Conversation,
    Split,
    assign_splits,
    by_split,
)
from probes.data.near_duplicates import merge_near_duplicates
from safe_decode.errors import DataError

__all__ = ["BALANCED", "Prepared", "prepared"]

BALANCED: tuple[Split, ...] = ("fit", "test")
"""Where each of the four cells holds its share: what is fitted on, and what is reported on."""


@dataclass(frozen=True)
class Prepared:
    """Rows in their splits.

    Attributes:
        conversations: Each with a split; no group stands in two.
        report: JSON: what was merged, how many rows each split holds, the cells.
        warnings: What is short, for people.
    """

    conversations: list[Conversation]
    report: dict[str, Any]
    warnings: list[str]


def prepared(
    rows: Sequence[Conversation],
    *,
    seed: int = 0,
    shares: Mapping[Split, float] = DEFAULT_SHARES,
    balance: bool = False,
) -> Prepared:
    """Split rows, or check the splits that they have.

    Args:
        rows: All with a split, or all without.
        seed: Of the split and of what balancing drops.
        shares: Of the splits.
        balance: Drop rows of fit and test until each cell holds its share.

    Raises:
        DataError: Some rows have a split and others not, a group stands in two, or a cell
            that is to be balanced is empty.
    """
    given = sum(row.split is not None for row in rows)
    if 0 < given < len(rows):
        raise DataError(f"{given} of {len(rows)} rows have a split; give all of them one, or none.")
    merged: dict[str, int] | None = None
    if not given:
        found = merge_near_duplicates(rows)
        merged = found.to_json()
        rows = assign_splits(found.conversations, seed=seed, shares=shares)
    parts = by_split(rows)
    if balance:
        for split in BALANCED:
            parts[split] = rebalanced(parts[split], seed=seed)
    warnings = [
        f"{split} holds too little of the cell {cell}"
        for split in BALANCED
        for cell in short_cells(parts[split])
    ]
    cells = {
        split: {str(cell): share for cell, share in cell_shares(parts[split]).items()}
        for split in BALANCED
    }
    report = {
        "rows": {split: len(parts[split]) for split in SPLITS},
        "splits": "given" if given else f"hash of the group, seed {seed}",
        "near_duplicates": merged,
        "cells": cells,
    }
    return Prepared([row for split in SPLITS for row in parts[split]], report, warnings)
