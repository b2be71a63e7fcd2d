"""Risk: how a statistic is shown, in [0, 1] and in shades.

For showing only; decisions compare the statistic. Does not know traces, colours or markup.
"""

from __future__ import annotations

import math

__all__ = ["BANDS", "band_of", "risk_of"]

BANDS = 6
"""Shades in which risk is drawn; the lower half lies below the threshold."""


def risk_of(statistic: float, threshold: float) -> float:
    """Map a statistic to a risk in [0, 1]: the sigmoid of its distance to the threshold.

    At the threshold the risk is 1/2. For showing only; decisions compare the statistic.
    """
    distance = statistic - threshold
    # Written so that exp never overflows, whatever the sign.
    shrunk = math.exp(-abs(distance))
    return 1.0 / (1.0 + shrunk) if distance >= 0 else shrunk / (1.0 + shrunk)


def band_of(risk: float | None) -> int:
    """Sort a risk into a shade, 0 the calmest and `BANDS - 1` the gravest; None is calm."""
    return 0 if risk is None else min(int(risk * BANDS), BANDS - 1)
