"""The four cells of request and response, and how a set is brought to hold enough of each.

A probe that sees harmful answers only to harmful requests learns to read the request. So
{harmful, benign request} x {harmful, harmless response} each make up a share of the splits
that are fitted and reported on.

Knows labels and counts. Does not know text or models.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from probes.data.conversations import Conversation
from safe_decode.errors import ConfigurationError, DataError

__all__ = ["CELLS", "LEAST_SHARE", "Cell", "cell_of", "cell_shares", "rebalanced", "short_cells"]

LEAST_SHARE = 0.15


class Cell(NamedTuple):
    """Whether the request and the response are harmful."""

    prompt_harmful: bool
    response_harmful: bool

    def __str__(self) -> str:
        """Name the cell for people."""
        request = "harmful" if self.prompt_harmful else "benign"
        return f"{request} request, {'harmful' if self.response_harmful else 'harmless'} response"


CELLS = tuple(Cell(prompt, response) for prompt in (True, False) for response in (True, False))


def cell_of(row: Conversation) -> Cell | None:
    """Find the cell of a conversation; None where request or response was not judged."""
    if row.prompt_harmful is None or row.response_harmful is None:
        return None
    return Cell(row.prompt_harmful, row.response_harmful)


def cell_shares(rows: Iterable[Conversation]) -> dict[Cell, float]:
    """Return the share of each cell among the rows that have one; all 0 of nothing."""
    counts = Counter(cell for row in rows if (cell := cell_of(row)) is not None)
    total = max(sum(counts.values()), 1)
    return {cell: counts[cell] / total for cell in CELLS}


def short_cells(rows: Iterable[Conversation], *, least: float = LEAST_SHARE) -> list[str]:
    """Name the cells that hold less than their share, with what they hold."""
    return [
        f"{cell}: {share:.1%}, wanted at least {least:.0%}"
        for cell, share in cell_shares(rows).items()
        if share < least
    ]


def rebalanced(
    rows: Sequence[Conversation], *, least: float = LEAST_SHARE, seed: int = 0
) -> list[Conversation]:
    """Drop rows from the largest cells until each cell holds its share.

    Rows without a cell are kept. Which rows go is decided by a seeded hash of group and
    response, so that the order of the rows does not matter.

    Raises:
        ConfigurationError: Four cells cannot each hold `least`.
        DataError: A cell is empty.
    """
    if not 0.0 < least <= 0.25:
        raise ConfigurationError(f"least={least} is outside (0, 0.25]; four cells share 1.")
    cells: dict[Cell, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if (cell := cell_of(row)) is not None:
            cells[cell].append(number)
    empty = [str(cell) for cell in CELLS if not cells[cell]]
    if empty:
        raise DataError(f"no row has a {'; nor a '.join(empty)}; add some, or do not balance.")
    cap = _cap([len(cells[cell]) for cell in CELLS], least)
    dropped: set[int] = set()
    for members in cells.values():
        members.sort(key=lambda number: _draw(rows[number], seed))
        dropped.update(members[cap:])
    return [row for number, row in enumerate(rows) if number not in dropped]


def _cap(counts: Sequence[int], least: float) -> int:
    """Find the largest number of rows a cell may keep so that the smallest has its share."""
    smallest, low, high = min(counts), min(counts), max(counts)
    while low < high:
        middle = (low + high + 1) // 2
        if smallest >= least * sum(min(count, middle) for count in counts):
            low = middle
        else:
            high = middle - 1
    return low


def _draw(row: Conversation, seed: int) -> bytes:
    text = f"{seed}\x1f{row.group}\x1f{row.response}"
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
