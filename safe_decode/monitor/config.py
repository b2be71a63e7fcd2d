"""How a stream of logits becomes one statistic: the choices, and their meaning in plain Python.

Per head h the logits are smoothed to a level, in one of three ways:

    ema     level_t = level_{t-1} + smoothing * (logit_t - level_{t-1}),  level before s_0 = start
    mean    the mean of the last `window` logits, of `start` where there are not that many yet
    cusum   level_t = max(0, level_{t-1} + logit_t - start - drift),  level before s_0 = 0

value_t = max_h (level_t[h] - offset[h]) / scale[h]. With hysteresis, smoothed_t is the
smallest of the last `hits` values, so that the alarm needs so many in a row; the values before
s_0 are that of `start`. statistic_t is the running maximum of smoothed; the alarm is
statistic > threshold. The raw maximum of the logits is an average with smoothing 1.

Knows numbers. Does not know tensors, models or where a threshold comes from; imports nothing
heavy, so that a bundle can be scored without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from safe_decode.errors import ConfigurationError

__all__ = ["MonitorConfig", "ReferenceStep", "StatisticKind", "reference"]

StatisticKind = Literal["ema", "mean", "cusum"]
"""ema: moving average. mean: windowed mean. cusum: one-sided cumulative sum (Page, 1954)."""


@dataclass(frozen=True)
class MonitorConfig:
    """How logits become a statistic; fitted, certified and stored with the probe.

    Attributes:
        smoothing: Weight of the newest logit in the moving average, in (0, 1]; 2 / (M + 1)
            matches a window of M. For `ema`.
        start: [K] where the level starts: the fitted benign mean.
        offset: [K] a_h, subtracted from the level of head h.
        scale: [K] b_h > 0, divides it.
        low_mark: A position is a clear point if its value lies below this.
        kind: See `StatisticKind`.
        window: Logits of a mean, at least 1. For `mean`.
        drift: Logits above `start` that a sum forgives at each step. For `cusum`.
        hits: Values in a row that have to lie above the threshold, at least 1.

    Raises:
        ConfigurationError: A value out of range, non-finite, or lengths that differ.
    """

    smoothing: float
    start: tuple[float, ...]
    offset: tuple[float, ...]
    scale: tuple[float, ...]
    low_mark: float
    kind: StatisticKind = "ema"
    window: int = 1
    drift: float = 0.0
    hits: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.smoothing <= 1.0:
            raise ConfigurationError(
                f"smoothing={self.smoothing} is outside (0, 1]; pass 2 / (M + 1) for a window of M."
            )
        lengths = {len(self.start), len(self.offset), len(self.scale)}
        if len(lengths) != 1 or not self.start:
            raise ConfigurationError(
                f"start, offset and scale have lengths {len(self.start)}, {len(self.offset)}, "
                f"{len(self.scale)}; pass one value for each head of the probe."
            )
        values = (*self.start, *self.offset, *self.scale, self.low_mark, self.drift)
        if not all(map(math.isfinite, values)) or min(self.scale) <= 0.0:
            raise ConfigurationError(
                f"start={self.start}, offset={self.offset}, scale={self.scale}, "
                f"low_mark={self.low_mark}, drift={self.drift} must be finite and scale positive; "
                "fit them again."
            )
        if self.kind not in get_args(StatisticKind):
            raise ConfigurationError(
                f"kind={self.kind!r} is not one of {get_args(StatisticKind)}; pass one of these."
            )
        if self.window < 1 or self.hits < 1:
            raise ConfigurationError(
                f"window={self.window} and hits={self.hits} must be at least 1."
            )

    @property
    def n_heads(self) -> int:
        """Count the heads K."""
        return len(self.start)

    @property
    def first_level(self) -> tuple[float, ...]:
        """[K], the level before the first score."""
        return (0.0,) * self.n_heads if self.kind == "cusum" else self.start

    @property
    def first_value(self) -> float:
        """What hysteresis takes for the values before the first score."""
        return self.value(self.first_level)

    def value(self, level: Sequence[float]) -> float:
        """Join the levels of all heads, [K], to one number in benign standard deviations."""
        pairs = zip(level, self.offset, self.scale, strict=True)
        return max((one - a) / b for one, a, b in pairs)


class ReferenceStep(NamedTuple):
    """One step of one row, in plain Python. See `monitor.MonitorState` for the words."""

    ema: tuple[float, ...]
    smoothed: float
    statistic: float
    alarm: bool
    clear_point: int
    finite: bool


def reference(
    config: MonitorConfig,
    threshold: float,
    logits: Sequence[Sequence[float]],
    shifts: Sequence[float] | None = None,
) -> list[ReferenceStep]:
    """Compute what `RiskMonitor` computes, one row, one number at a time.

    The oracle for tests and for replay. A non-finite logit makes the row non-finite for
    good; its other values are then not meaningful.

    Args:
        config: How logits become a statistic.
        threshold: The row's threshold.
        logits: [T, K], one list a score.
        shifts: [T], by how much each value is lowered; None: by nothing.
    """
    level = config.first_level
    recent = [tuple(config.start)] * (config.window - 1)
    values = [config.first_value] * (config.hits - 1)
    statistic, clear_point, finite = -math.inf, -1, True
    steps = []
    for index, heads in enumerate(logits):
        finite = finite and all(map(math.isfinite, heads))
        recent.append(tuple(heads))
        level = _next_level(config, level, recent)
        recent = recent[1:]
        value = config.value(level) - (0.0 if shifts is None else shifts[index])
        values = [*values, value][-config.hits :]
        smoothed = min(values)
        statistic = max(statistic, smoothed)
        clear_point = index if value < config.low_mark else clear_point
        alarm = statistic > threshold
        steps.append(ReferenceStep(level, smoothed, statistic, alarm, clear_point, finite))
    return steps


def _next_level(
    config: MonitorConfig, level: Sequence[float], recent: Sequence[Sequence[float]]
) -> tuple[float, ...]:
    newest = recent[-1]
    if config.kind == "mean":
        return tuple(sum(column) / config.window for column in zip(*recent, strict=True))
    if config.kind == "cusum":
        triples = zip(level, newest, config.start, strict=True)
        return tuple(max(0.0, old + new - start - config.drift) for old, new, start in triples)
    pairs = zip(level, newest, strict=True)
    return tuple(old + config.smoothing * (new - old) for old, new in pairs)
