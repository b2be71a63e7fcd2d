"""A boundary at which harmless responses alarm as often early as late.

A response trips by its largest value, and a statistic does not spread alike at every position. With
one threshold for all positions, false alarms gather where it spreads most. The boundary is found
block by block: among the harmless responses that reach a block and have not alarmed before it, the
same share per 64 tokens alarms in it. Found on select, before any threshold.

Knows paths of harmless responses. Does not know thresholds or certificates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Boundary", "hazards", "spent_evenly"]

BLOCK = 64
_SHARE = 0.04
"""Of the responses that reach a block of 64 tokens, so many alarm in it at the boundary: enough to
be counted on a few hundred responses, and few enough to be a tail."""
_FEWEST = 50
"""Responses that a block needs; beyond the last that has them the boundary stays where it is."""


class Boundary(NamedTuple):
    """Heights at some scores; see `safe_decode.monitor.config.MonitorConfig`."""

    at: tuple[int, ...]
    heights: tuple[float, ...]


def spent_evenly(paths: Sequence[NDArray[np.float32]]) -> Boundary:
    """Find the boundary of the statistic of harmless responses.

    Args:
        paths: [T + 1] each, before the running maximum.

    Returns:
        One knot a block; blocks grow with position, from 16 tokens on. Empty where there are too
        few responses for even the first.
    """
    at: list[int] = []
    heights: list[float] = []
    alive = list(range(len(paths)))
    begin, end = 0, BLOCK // 4
    while True:
        alive = [row for row in alive if len(paths[row]) > begin]
        if len(alive) < _FEWEST:
            return Boundary(tuple(at), tuple(heights))
        here = [paths[row][begin:end] for row in alive]
        peaks = np.asarray([part.max() for part in here], np.float64)
        exposed = sum(map(len, here)) / len(here)
        height = float(np.quantile(peaks, (1.0 - _SHARE) ** (exposed / BLOCK)))
        at.append(begin + round(exposed / 2))
        heights.append(height)
        alive = [row for row, peak in zip(alive, peaks, strict=True) if peak <= height]
        begin, end = end, end + max(BLOCK // 4, 1 << (end.bit_length() - 2))


def hazards(
    paths: Sequence[NDArray[np.float32]], threshold: float, *, block: int = BLOCK
) -> list[tuple[int, int]]:
    """Count, block by block, the responses that alarm first in it, of those that reach it.

    Args:
        paths: [T + 1] each, before the running maximum.
        threshold: An alarm is a value above it.
        block: Tokens of a block; s_0 belongs to the first.

    Returns:
        For each block (alarms, responses at risk), up to the longest response.
    """
    counts: list[list[int]] = []
    for path in paths:
        above = np.flatnonzero(path > threshold)
        last = int(above[0]) if len(above) else len(path) - 1
        for number in range(max(last - 1, 0) // block + 1):
            if number == len(counts):
                counts.append([0, 0])
            counts[number][1] += 1
        if len(above):
            counts[max(last - 1, 0) // block][0] += 1
    return [(alarms, at_risk) for alarms, at_risk in counts]
