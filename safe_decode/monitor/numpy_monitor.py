"""The monitor in NumPy: what `monitor.monitor` computes, in float32, without torch.

What is computed is defined in `monitor.config`. Knows logits and states. Does not know bundles.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_decode.monitor.config import MonitorConfig

__all__ = ["NumpyMonitorState", "start_state", "step_state"]

Floats = NDArray[np.float32]


class NumpyMonitorState(NamedTuple):
    """What the monitor remembers of each row; see `monitor.monitor.MonitorState` for the words.

    Attributes:
        ema: [batch, n_levels] float32.
        smoothed: [batch] float32.
        statistic: [batch] float32.
        alarm: [batch] bool.
        step: [batch] int64.
        clear_point: [batch] int64.
        finite: [batch] bool.
        recent: [batch, kept, K] float32; empty but for `mean` and `top`.
        values: [batch, hits - 1] float32.
    """

    ema: Floats
    smoothed: Floats
    statistic: Floats
    alarm: NDArray[np.bool_]
    step: NDArray[np.int64]
    clear_point: NDArray[np.int64]
    finite: NDArray[np.bool_]
    recent: Floats
    values: Floats


def start_state(config: MonitorConfig, batch: int) -> NumpyMonitorState:
    """Begin rows."""
    level = np.tile(np.asarray(config.first_level, np.float32), (batch, 1))
    recent = np.asarray(config.first_recent, np.float32).reshape(-1, config.n_heads)
    low = np.full(batch, -np.inf, np.float32)
    nothing = np.zeros(batch, np.int64)
    return NumpyMonitorState(
        ema=level,
        smoothed=low,
        statistic=low,
        alarm=np.zeros(batch, bool),
        step=nothing,
        clear_point=nothing - 1,
        finite=np.ones(batch, bool),
        recent=np.tile(recent, (batch, 1, 1)),
        values=np.full((batch, config.hits - 1), config.first_value, np.float32),
    )


def step_state(
    config: MonitorConfig, threshold: float, state: NumpyMonitorState, logits: Floats
) -> NumpyMonitorState:
    """Consume one score a row, [batch, K]; pure."""
    with np.errstate(invalid="ignore"):  # what is not finite is told by `finite`
        level, recent = _level(config, state, np.asarray(logits, np.float32))
        scale = np.asarray(config.scale, np.float64)
        inverse = (1.0 / scale).astype(np.float32)
        shift = (-np.asarray(config.offset) / scale).astype(np.float32)
        value = (shift + level * inverse).max(axis=-1)
        if config.boundary:
            boundary = _boundary_of(config)
            value = value - boundary[np.minimum(state.step, len(boundary) - 1)]
        finite = state.finite & ((level - level).sum(axis=-1) == 0)
        values = np.concatenate([state.values, value[:, None]], axis=1)
        smoothed = values.min(axis=1)
        statistic = np.maximum(state.statistic, smoothed)
        clear = np.where(value < np.float32(config.low_mark), state.step, state.clear_point)
        return NumpyMonitorState(
            ema=level,
            smoothed=smoothed,
            statistic=statistic,
            alarm=statistic > np.float32(threshold),
            step=state.step + 1,
            clear_point=clear,
            finite=finite,
            recent=recent,
            values=values[:, 1:],
        )


@lru_cache(maxsize=16)
def _boundary_of(config: MonitorConfig) -> Floats:
    return np.asarray(config.boundary_table, np.float32)


def _level(
    config: MonitorConfig, state: NumpyMonitorState, logits: Floats
) -> tuple[Floats, Floats]:
    if config.kind == "ema":
        level = state.ema + np.float32(config.smoothing) * (logits - state.ema)
        return level, state.recent
    if config.kind == "mean":
        window = np.concatenate([state.recent, logits[:, None]], axis=1)
        return window.mean(axis=1, dtype=np.float32), window[:, 1:]
    if config.kind == "shrunk":
        return state.ema + _gain(config, state) * (logits - state.ema), state.recent
    if config.kind == "bank":
        gain = np.repeat(_gain(config, state), config.n_levels, axis=1)
        gain[:, config.n_heads :] = np.float32(config.smoothing)
        return state.ema + gain * (np.tile(logits, (1, 2)) - state.ema), state.recent
    if config.kind == "top":
        return _best_windows(config, state, logits)
    forgiven = np.asarray(config.start, np.float32) + np.float32(config.drift)
    return np.maximum(state.ema + (logits - forgiven), 0) + (logits - logits), state.recent


def _gain(config: MonitorConfig, state: NumpyMonitorState) -> Floats:
    gain = np.float32(1) / (state.step + (config.window + 1)).astype(np.float32)
    return gain[:, None]


def _best_windows(
    config: MonitorConfig, state: NumpyMonitorState, logits: Floats
) -> tuple[Floats, Floats]:
    start = np.asarray(config.start, np.float32)
    sums = state.recent[:, -1] + (logits - start)
    current = start + sums / np.float32(config.window)
    windows = np.concatenate([state.recent[:, :-1], current[:, None]], axis=1)
    best = -np.sort(-windows, axis=1)[:, : config.best]
    ends = ((state.step + 1) % config.window == 0)[:, None, None]
    going_on = np.concatenate([state.recent[:, :-1], sums[:, None]], axis=1)
    ended = np.concatenate([best, np.zeros_like(sums)[:, None]], axis=1)
    level = best.mean(axis=1, dtype=np.float32) + (logits - logits)
    return level, np.where(ends, ended, going_on)
