"""Shares and figures with intervals: exact for independent draws, by clusters where not.

Knows counts, groups and resampling. Does not know what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from probes.runs.progress import progress
from safe_decode.errors import ConfigurationError, DataError

__all__ = ["Interval", "Proportion", "cluster_draws", "holm", "interval_of", "plain_json"]

_DRAWS = 1000


@dataclass(frozen=True)
class Proportion:
    """A share with exact (Clopper-Pearson) bounds.

    Attributes:
        successes: How many.
        n: Of how many independent draws.
        low: Lower end of the two-sided 95 % interval.
        high: Upper end of the two-sided 95 % interval.
        lower_bound: One-sided 95 % lower bound.
        upper_bound: One-sided 95 % upper bound.
    """

    successes: int
    n: int
    low: float
    high: float
    lower_bound: float
    upper_bound: float

    @property
    def point(self) -> float:
        """The observed share; NaN of nothing."""
        return self.successes / self.n if self.n else math.nan

    @classmethod
    def of(cls, successes: int, n: int) -> Proportion:
        """Count `successes` among `n`; of nothing, the bounds are 0 and 1."""
        if not 0 <= successes <= n:
            raise ConfigurationError(f"successes={successes} is outside 0..{n}; count again.")
        low, high = _bounds(successes, n, 0.025)
        lower, upper = _bounds(successes, n, 0.05)
        return cls(successes, n, low, high, lower, upper)


class Interval(NamedTuple):
    """A figure with a two-sided 95 % interval.

    Attributes:
        point: On the rows as they are.
        low: 2.5th percentile over the draws.
        high: 97.5th.
        p_above_0: One-sided bootstrap p-value of the figure being at most 0, never below
            1 / (draws + 1).
    """

    point: float
    low: float
    high: float
    p_above_0: float


def cluster_draws(
    figures: Callable[[NDArray[np.intp]], NDArray[np.float64]],
    clusters: Sequence[str],
    *,
    draws: int = _DRAWS,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Resample whole clusters with replacement and compute figures on each draw.

    All figures are computed on the same draws, so that differences between columns are paired.

    Args:
        figures: From row numbers, repeated as drawn, to [m] figures; NaN where undefined.
        clusters: Of each row, such as the prompt group.
        draws: How many.
        seed: Of the draws.

    Returns:
        [draws, m].

    Raises:
        DataError: No row.
    """
    names, of_row = np.unique(np.asarray(clusters), return_inverse=True)
    if not len(names):
        raise DataError("there is no row to resample; give at least one.")
    order = np.argsort(of_row, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(of_row))[:-1])
    rng = np.random.default_rng(seed)
    found = []
    with progress("resampling", draws) as advance:
        for _ in range(draws):
            drawn = rng.integers(len(names), size=len(names))
            found.append(figures(np.concatenate([members[i] for i in drawn])))
            advance(1)
    return np.asarray(found)


def interval_of(point: float, draws: NDArray[np.float64]) -> Interval:
    """Summarise the draws of one figure, [draws]; draws without a figure are left out."""
    known = draws[~np.isnan(draws)]
    if not len(known) or math.isnan(point):
        return Interval(point, math.nan, math.nan, math.nan)
    low, high = np.quantile(known, [0.025, 0.975])
    p_value = (1 + int((known <= 0).sum())) / (1 + len(known))
    return Interval(point, float(low), float(high), p_value)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for their number by Holm's step-down method; NaN stays NaN."""
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    adjusted = dict.fromkeys(p_values, math.nan)
    largest = 0.0
    for place, (p_value, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - place) * p_value))
        adjusted[name] = largest
    return adjusted


def _bounds(successes: int, n: int, tail: float) -> tuple[float, float]:
    low = float(beta.ppf(tail, successes, n - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, n - successes)) if successes < n else 1.0
    return low, high


def plain_json(value: object) -> Any:  # noqa: ANN401 - of the kind of `value`
    """Return what JSON can hold: NaN becomes null, an infinity the text `inf`."""
    if isinstance(value, Mapping):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value
