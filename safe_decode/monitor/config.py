"""How a stream of logits becomes one statistic: the choices, and their meaning in plain Python.

Per head h the logits are smoothed to a level, in one of six ways:

    ema     level_t = level_{t-1} + smoothing * (logit_t - level_{t-1}),  level before s_0 = start
    mean    the mean of the last `window` logits, of `start` where there are not that many yet
    cusum   level_t = max(0, level_{t-1} + logit_t - start - drift),  level before s_0 = 0
    shrunk  the mean of all logits so far and of `window` times `start`
    top     the mean of the `best` largest of the means of disjoint windows of `window` logits;
            `start` stands for windows that are missing, and for logits that the last one lacks
    bank    two levels a head, shrunk of `window` and ema of `smoothing`: one remembers all that
            was said, the other forgets a harmless beginning

value_t = max_h (level_t[h] - offset[h]) / scale[h] - boundary(t), where the boundary, if there is
one, is what harmless responses reach at that position: a threshold that depends on how much has
been said, and not on what. With hysteresis, smoothed_t is the
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

__all__ = ["HARD_TO_UNDO", "MonitorConfig", "ReferenceStep", "StatisticKind", "reference"]

StatisticKind = Literal["ema", "mean", "cusum", "shrunk", "top", "bank"]
"""ema: moving average. mean: windowed mean. cusum: one-sided cumulative sum (Page, 1954). shrunk:
cumulative mean, shrunk towards the benign mean by a prior. top: several windows have to agree
(SC-TopK, arXiv 2604.14865). bank: a shrunk mean and a moving average, the larger of both."""

HARD_TO_UNDO: tuple[StatisticKind, ...] = ("mean", "top")
"""A logit that is not finite leaves the level again; that it was there has to be remembered."""


@dataclass(frozen=True)
class MonitorConfig:
    """How logits become a statistic; fitted, certified and stored with the probe.

    Attributes:
        smoothing: Weight of the newest logit in the moving average, in (0, 1]; 2 / (M + 1)
            matches a window of M. For `ema` and `bank`.
        start: [K] where the level starts: the fitted benign mean.
        offset: [K] a_h, subtracted from the level of head h; of a bank [2 K], those of the shrunk
            means first.
        scale: [K], of a bank [2 K], b_h > 0, divides it.
        low_mark: A position is a clear point if its value lies below this.
        kind: See `StatisticKind`.
        window: Logits of a mean, or that `start` counts for; at least 1. For `mean`, `shrunk`,
            `top` and `bank`.
        drift: Logits above `start` that a sum forgives at each step. For `cusum`.
        hits: Values in a row that have to lie above the threshold, at least 1.
        best: Windows that have to agree, at least 1. For `top`.
        boundary_at: Scores, counted from 0 and ascending, at which the boundary is given; it is
            linear in log(1 + score) between them and constant outside. Empty: there is none.
        boundary: What is subtracted from the value there.

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
    best: int = 1
    boundary_at: tuple[int, ...] = ()
    boundary: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.smoothing <= 1.0:
            raise ConfigurationError(
                f"smoothing={self.smoothing} is outside (0, 1]; pass 2 / (M + 1) for a window of M."
            )
        if {len(self.offset), len(self.scale)} != {self.n_levels} or not self.start:
            raise ConfigurationError(
                f"start, offset and scale have lengths {len(self.start)}, {len(self.offset)}, "
                f"{len(self.scale)}; pass one value for each head of the probe, and of a bank two "
                "in offset and scale."
            )
        values = (
            *(*self.start, *self.offset, *self.scale, self.low_mark, self.drift),
            *self.boundary,
        )
        if not all(map(math.isfinite, values)) or min(self.scale) <= 0.0:
            raise ConfigurationError(
                f"start={self.start}, offset={self.offset}, scale={self.scale}, "
                f"low_mark={self.low_mark}, drift={self.drift}, boundary={self.boundary} must be "
                "finite and scale positive; fit them again."
            )
        places = (-1, *self.boundary_at)
        ascends = all(one < other for one, other in zip(places, places[1:], strict=False))
        if len(self.boundary_at) != len(self.boundary) or not ascends:
            raise ConfigurationError(
                f"boundary_at={self.boundary_at} must ascend from 0 or more and have one entry for "
                f"each of boundary={self.boundary}; fit them again."
            )
        if self.kind not in get_args(StatisticKind):
            raise ConfigurationError(
                f"kind={self.kind!r} is not one of {get_args(StatisticKind)}; pass one of these."
            )
        if self.window < 1 or self.hits < 1 or self.best < 1:
            raise ConfigurationError(
                f"window={self.window}, hits={self.hits} and best={self.best} must be at least 1."
            )

    @property
    def n_heads(self) -> int:
        """Count the heads K."""
        return len(self.start)

    @property
    def n_levels(self) -> int:
        """Count the levels of a row."""
        return self.n_heads * (2 if self.kind == "bank" else 1)

    @property
    def is_moving_average(self) -> bool:
        """Whether the statistic is a moving average, plain."""
        return self.kind == "ema" and self.level_decides

    @property
    def level_decides(self) -> bool:
        """Whether the level alone says if there is an alarm, and is a mean of logits."""
        return self.kind in ("ema", "shrunk", "bank") and self.hits == 1 and not self.boundary

    @property
    def first_level(self) -> tuple[float, ...]:
        """[n_levels], the level before the first score."""
        if self.kind == "bank":
            return self.start * 2
        return (0.0,) * self.n_heads if self.kind == "cusum" else self.start

    @property
    def first_value(self) -> float:
        """What hysteresis takes for the values before the first score."""
        return self.value(self.first_level)

    @property
    def first_recent(self) -> tuple[tuple[float, ...], ...]:
        """What is remembered beside the level before the first score, [kept, K].

        Of a mean the last `window` - 1 logits; of the best windows their means and, last, the
        logits of the window in progress less `start`, summed.
        """
        if self.kind == "mean":
            return (self.start,) * (self.window - 1)
        if self.kind == "top":
            return (*(self.start,) * self.best, (0.0,) * self.n_heads)
        return ()

    @property
    def boundary_table(self) -> tuple[float, ...]:
        """The boundary at each score up to the last that it is given at, which holds from there on.

        Empty where there is none.
        """
        if not self.boundary:
            return ()
        return tuple(self._boundary(score) for score in range(self.boundary_at[-1] + 1))

    def _boundary(self, score: int) -> float:
        if score <= self.boundary_at[0]:
            return self.boundary[0]
        after = next(i for i, place in enumerate(self.boundary_at) if place >= score)
        left, right = (math.log1p(self.boundary_at[i]) for i in (after - 1, after))
        share = (math.log1p(score) - left) / (right - left)
        low, high = self.boundary[after - 1 : after + 1]
        return low + share * (high - low)

    def value(self, level: Sequence[float]) -> float:
        """Join the levels of all heads, [n_levels], to one number in benign standard deviations."""
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
    level, recent = config.first_level, config.first_recent
    values = [config.first_value] * (config.hits - 1)
    statistic, clear_point, finite = -math.inf, -1, True
    boundary = config.boundary_table or (0.0,)
    steps = []
    for index, heads in enumerate(logits):
        finite = finite and all(map(math.isfinite, heads))
        level, recent = _next_level(config, level, recent, tuple(heads), index)
        value = config.value(level) - boundary[min(index, len(boundary) - 1)]
        value -= 0.0 if shifts is None else shifts[index]
        values = [*values, value][-config.hits :]
        smoothed = min(values)
        statistic = max(statistic, smoothed)
        clear_point = index if value < config.low_mark else clear_point
        alarm = statistic > threshold
        steps.append(ReferenceStep(level, smoothed, statistic, alarm, clear_point, finite))
    return steps


_Heads = tuple[float, ...]


def _next_level(
    config: MonitorConfig, level: _Heads, recent: tuple[_Heads, ...], newest: _Heads, index: int
) -> tuple[_Heads, tuple[_Heads, ...]]:
    """Return the level after a logit, and what is remembered beside it."""
    if config.kind == "mean":
        window = (*recent, newest)
        return tuple(sum(head) / config.window for head in zip(*window, strict=True)), window[1:]
    if config.kind == "top":
        return _best_windows(config, recent, newest, index)
    pairs = zip(level, newest, config.start, strict=True)
    if config.kind == "cusum":
        return tuple(max(0.0, old + new - s - config.drift) for old, new, s in pairs), recent
    gain, smoothing = 1.0 / (config.window + index + 1), config.smoothing
    if config.kind == "bank":
        heads = len(newest)
        weights = (gain,) * heads + (smoothing,) * heads
        moves = zip(level, newest * 2, weights, strict=True)
        return tuple(old + weight * (new - old) for old, new, weight in moves), recent
    weight = smoothing if config.kind == "ema" else gain
    return tuple(old + weight * (new - old) for old, new, _ in pairs), recent


def _best_windows(
    config: MonitorConfig, recent: tuple[_Heads, ...], newest: _Heads, index: int
) -> tuple[_Heads, tuple[_Heads, ...]]:
    *means, sums = recent
    sums = tuple(total + new - s for total, new, s in zip(sums, newest, config.start, strict=True))
    current = tuple(s + total / config.window for s, total in zip(config.start, sums, strict=True))
    heads = [
        sorted(head, reverse=True)[: config.best] for head in zip(*means, current, strict=True)
    ]
    level = tuple(sum(head) / config.best for head in heads)
    if (index + 1) % config.window:
        return level, (*means, sums)
    return level, (*zip(*heads, strict=True), (0.0,) * config.n_heads)
