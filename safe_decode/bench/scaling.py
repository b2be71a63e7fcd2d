"""How cost grows: one thing varied, all else held, and a straight line through what it adds.

Knows what can be varied and how. Does not know how one point is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from safe_decode.bench.arms import Lap, Load, arms_of, options_of
from safe_decode.bench.models import ProbeShape, Subject, of_shape
from safe_decode.bench.runner import interleaved
from safe_decode.bench.statistics import slope_of
from safe_decode.errors import ConfigurationError

__all__ = ["AXES", "Axis", "Made", "growth_rows", "values_of"]

Axis = Literal["batch", "context", "features", "heads", "sites", "vocab"]
AXES: tuple[Axis, ...] = get_args(Axis)

DEFAULTS: dict[Axis, tuple[int, ...]] = {
    "batch": (1, 4, 16, 64, 256),
    "context": (128, 512, 2_048, 8_192),
    "features": (64, 256, 1_024, 4_096, 16_384),
    "heads": (1, 4, 16),
    "sites": (1, 4, 12),
    "vocab": (2_000, 16_000, 128_000),
}


@dataclass(frozen=True)
class Made:
    """How the subject of each point is made; batch and context need no other subject."""

    shape: str
    probe: ProbeShape = ProbeShape()
    device: str = "cpu"
    dtype: str = "float32"

    def subject(self, axis: Axis, value: int) -> Subject:
        """Make the subject of one point."""
        probe, vocab = self.probe, None
        if axis in ("features", "heads", "sites"):
            probe = replace(probe, **{axis: value})
        elif axis == "vocab":
            vocab = value
        return of_shape(self.shape, probe=probe, device=self.device, dtype=self.dtype, vocab=vocab)


def values_of(text: str) -> tuple[Axis, tuple[int, ...]]:
    """Read `AXIS` or `AXIS=1,2,4`.

    Raises:
        ConfigurationError: An unknown axis, or values that are not at least two ascending
            numbers.
    """
    name, _, listed = text.partition("=")
    axis = next((known for known in AXES if known == name), None)
    if axis is None:
        raise ConfigurationError(f"grow={text!r} is not one of {', '.join(AXES)}; pass one.")
    if not listed:
        return axis, DEFAULTS[axis]
    try:
        values = tuple(int(one) for one in listed.split(","))
    except ValueError:
        values = ()
    if len(values) < 2 or min(values) < 1 or list(values) != sorted(set(values)):
        raise ConfigurationError(
            f"grow={text!r} wants at least two ascending positive numbers, as in batch=1,8,32."
        )
    return axis, values


def growth_rows(
    made: Made,
    axis: Axis,
    values: Sequence[int],
    load: Load,
    *,
    rounds: int,
    tick: Callable[[int], None] = lambda _: None,
) -> list[dict[str, object]]:
    """Measure bare and guarded at each value: a row a point, the slope in each.

    Args:
        made: How subjects are made.
        axis: What is varied.
        values: Its values, ascending.
        load: All else.
        rounds: Of each point.
        tick: Told of each call.
    """
    points: list[dict[str, Any]] = []
    added: list[list[float]] = []
    subject = made.subject(axis, values[0])
    for value in values:
        if axis not in ("batch", "context"):
            subject = made.subject(axis, value)
        here = _load_at(load, axis, value)
        arms = arms_of(subject, replace(here, batch=1))
        pair = {name: arms[name] for name in ("bare", "guard")}
        options = options_of(subject, here)
        laps = interleaved(pair, options, rounds=rounds, clock=load.clock, tick=tick)
        bare, guarded = _round_us(laps["bare"]), _round_us(laps["guard"])
        added.append([g - b for g, b in zip(guarded, bare, strict=True)])
        points.append(
            {
                "axis": axis,
                "value": value,
                "shape": made.shape,
                "dtype": made.dtype,
                "device": made.device,
                "mode": here.mode,
                "batch": here.batch,
                "context": here.context,
                "n_rounds": rounds,
                "clock": load.clock,
                "bare_us": round(float(np.median(bare)), 1),
                "added_us": round(float(np.median(added[-1])), 1),
            }
        )
    slope = slope_of(values, added)
    fitted = {
        "slope_us_per_unit": round(slope.per_unit.point, 5),
        "slope_us_95": slope.per_unit.as_list(5),
        "at_zero_us": round(slope.at_zero, 1),
    }
    return [{**point, **fitted} for point in points]


def _load_at(load: Load, axis: Axis, value: int) -> Load:
    if axis == "batch":
        return replace(load, batch=value)
    return replace(load, context=value) if axis == "context" else load


def _round_us(laps: Sequence[Lap]) -> list[float]:
    return [float(np.median(lap.steps)) / 1e3 for lap in laps]
