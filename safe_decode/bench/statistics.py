"""From laps to figures: medians, ratios to the bare model with intervals, slopes, comparison.

Knows arithmetic. Does not know models or clocks. The unit of the bootstrap is the round, in
which every arm ran once, minutes of drift apart from no other arm: a ratio is taken inside its
round, and rounds are drawn with replacement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safe_decode.bench.arms import Lap

__all__ = ["MedianInterval", "Slope", "figures_of", "interval_of", "slope_of"]

N_RESAMPLES = 2_000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class MedianInterval:
    """A median over rounds with its 95 % bootstrap interval."""

    point: float
    low: float
    high: float

    def as_list(self, digits: int) -> list[float]:
        """Return [low, high], rounded."""
        return [round(self.low, digits), round(self.high, digits)]


def interval_of(values: Sequence[float] | Array, *, seed: int = 0) -> MedianInterval:
    """Take the median over rounds, [n], and bootstrap it (Efron, 1979; percentile)."""
    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).choice(array, size=(N_RESAMPLES, len(array)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return MedianInterval(float(np.median(array)), float(low), float(high))


def figures_of(laps: Mapping[str, Sequence[Lap]], *, batch: int) -> list[dict[str, object]]:
    """Turn the laps of interleaved arms into a row an arm.

    Args:
        laps: Arm to its laps, one a round, in the order of the rounds; one is "bare".
        batch: Rows of each call.
    """
    steps = {name: _step_us([lap.steps for lap in taken]) for name, taken in laps.items()}
    device = {name: _step_us([lap.device_steps for lap in taken]) for name, taken in laps.items()}
    return [{**_row(name, laps[name], steps, batch), **_device_row(name, device)} for name in laps]


def _device_row(name: str, steps: Mapping[str, Array]) -> dict[str, object]:
    """By the device's own clock; None where it has none."""
    mine, bare = steps[name], steps["bare"]
    if not mine.size or not bare.size:
        return dict.fromkeys(("device_tpot_us", "device_ratio", "device_ratio_95"))
    ratio = interval_of(np.median(mine, axis=1) / np.median(bare, axis=1))
    return {
        "device_tpot_us": round(float(np.median(mine)), 1),
        "device_ratio": round(ratio.point, 4),
        "device_ratio_95": ratio.as_list(4),
    }


def _row(
    name: str, laps: Sequence[Lap], steps: Mapping[str, Array], batch: int
) -> dict[str, object]:
    mine, bare = steps[name], steps["bare"]
    per_round, bare_round = np.median(mine, axis=1), np.median(bare, axis=1)
    ratio, added = interval_of(per_round / bare_round), interval_of(per_round - bare_round)
    median = float(np.median(mine))
    return {
        "arm": name,
        "n_rounds": len(laps),
        "n_steps": int(mine.size),
        "tpot_us": round(median, 1),
        "tpot_p95_us": round(float(np.quantile(mine, 0.95)), 1),
        "added_us": round(added.point, 1),
        "added_us_95": added.as_list(1),
        "ratio": round(ratio.point, 4),
        "ratio_95": ratio.as_list(4),
        "tokens_per_s": round(1e6 * batch / median, 1),
        "ttft_ms": round(float(np.median([lap.first for lap in laps])) / 1e6, 3),
        "rest_ms": round(float(np.median([lap.rest for lap in laps])) / 1e6, 3),
    }


def _step_us(laps: Sequence[Sequence[int]]) -> Array:
    """[rounds, steps] microseconds; laps cut short by trips are cut to the shortest."""
    shortest = min(len(steps) for steps in laps)
    return np.asarray([steps[:shortest] for steps in laps], dtype=np.float64) / 1e3


@dataclass(frozen=True)
class Slope:
    """A straight line through points: what one more of x costs."""

    per_unit: MedianInterval
    at_zero: float


def slope_of(x: Sequence[float], rounds: Sequence[Sequence[float]], *, seed: int = 0) -> Slope:
    """Fit y = a + b x by least squares, with a bootstrap over rounds.

    Args:
        x: [n] positions, at least two that differ.
        rounds: [n][rounds], what was measured at each.
        seed: Of the bootstrap.
    """
    places = np.asarray(x, dtype=np.float64)
    rng = np.random.default_rng(seed)
    medians = np.asarray([np.median(at) for at in rounds])
    drawn = np.stack(
        [
            np.median(rng.choice(np.asarray(at), size=(N_RESAMPLES, len(at))), axis=1)
            for at in rounds
        ]
    )
    centred = places - places.mean()
    slopes = centred @ drawn / float(centred @ centred)
    point = float(centred @ medians / float(centred @ centred))
    low, high = np.quantile(slopes, (0.025, 0.975))
    at_zero = float(medians.mean() - point * places.mean())
    return Slope(MedianInterval(point, float(low), float(high)), at_zero)
