"""A stream of probe logits turned into one calibrated statistic a row.

Knows smoothing, the running maximum, thresholds and clear points, for any number of
rows at once. Does not know models, tokens, text or what happens after an alarm.

What is computed is defined in `config`, whose `reference` says the same in plain
Python and is what the tensors are tested against. State is O(1) a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from safe_decode.errors import ConfigurationError
from safe_decode.host_copies import sent
from safe_decode.monitor.config import (
    HARD_TO_UNDO,
    MonitorConfig,
    ReferenceStep,
    StatisticKind,
    reference,
)

__all__ = [
    "MonitorConfig",
    "MonitorState",
    "ReferenceStep",
    "RiskMonitor",
    "StatisticKind",
    "moved",
    "reference",
]


class MonitorState(NamedTuple):
    """Everything the monitor remembers of each row.

    Attributes:
        ema: [batch, n_levels] float, the level: smoothed logits, of whatever kind.
        smoothed: [batch] float, the value after hysteresis, before any maximum over time;
            -inf before the first step.
        statistic: [batch] float, running maximum of smoothed; -inf before the first step.
        alarm: [batch] bool, statistic > threshold.
        step: [batch] int64, scores consumed.
        clear_point: [batch] int64, the last score, counted from 0, whose value (before
            hysteresis, which lags behind) lay below the low mark; -1 where there was none.
        finite: [batch] bool, False from the first NaN or Inf on.
        recent: [batch, kept, K] float, see `MonitorConfig.first_recent`; empty but for `mean` and
            `top`.
        values: [batch, hits - 1] float, the last values; empty without hysteresis.
    """

    ema: Tensor
    smoothed: Tensor
    statistic: Tensor
    alarm: Tensor
    step: Tensor
    clear_point: Tensor
    finite: Tensor
    recent: Tensor
    values: Tensor

    def row(self, index: int) -> MonitorState:
        """Copy one row out, [1] each."""
        return MonitorState(*(field[index : index + 1].clone() for field in self))

    def with_rows(self, rows: Mapping[int, MonitorState]) -> MonitorState:
        """Put other states, [1] each, in the place of some rows."""
        if not rows:
            return self
        fields = [field.clone() for field in self]
        for index, row in rows.items():
            for field, value in zip(fields, row, strict=True):
                field[index] = value[0]
        return MonitorState(*fields)


class RiskMonitor:
    """Steps the state of a batch of rows; holds no state itself.

    Args:
        config: How logits become a statistic.
        threshold: One number for all rows, or a tensor [batch].

    Raises:
        ConfigurationError: The threshold is NaN, or not a number or a tensor [batch].
    """

    def __init__(self, config: MonitorConfig, threshold: float | Tensor) -> None:
        self.config = config
        self.threshold = torch.as_tensor(threshold, dtype=torch.float32)
        if self.threshold.ndim > 1 or bool(self.threshold.isnan().any()):
            raise ConfigurationError(
                f"threshold={threshold} must be one number or a tensor [batch] without NaN; "
                "take it from the bundle's certificate."
            )
        # Divided once here, so that a step is one multiply-add. K floats, never updated.
        self._inverse_scale = torch.tensor(config.scale, dtype=torch.float64).reciprocal().float()
        self._shift = -torch.tensor(config.offset, dtype=torch.float64) / torch.tensor(config.scale)
        self._shift = self._shift.float()
        self._start = torch.tensor(config.start)
        self._forgiven = self._start + config.drift
        self._is_plain = config.n_levels == 1
        self._boundary = torch.tensor(config.boundary_table)

    def start(self, batch: int, device: torch.device | str = "cpu") -> MonitorState:
        """Begin `batch` rows on `device`; the monitor's constants move there with them.

        Raises:
            ConfigurationError: Thresholds were given for another number of rows.
        """
        if self.threshold.ndim == 1 and self.threshold.shape[0] != batch:
            raise ConfigurationError(
                f"threshold has {self.threshold.shape[0]} rows for a batch of {batch}; "
                "pass one threshold for each row."
            )
        self.threshold = sent(self.threshold, device)
        vars(self).pop("_bounds", None)
        self._inverse_scale = sent(self._inverse_scale, device)
        self._shift = sent(self._shift, device)
        self._start, self._forgiven = sent(self._start, device), sent(self._forgiven, device)
        self._boundary = sent(self._boundary, device)
        low = torch.full((batch,), -torch.inf, device=device)
        nothing = torch.zeros(batch, dtype=torch.int64, device=device)
        config = self.config
        recent = sent(config.first_recent, device).view(-1, config.n_heads)
        return MonitorState(
            ema=sent(config.first_level, device).expand(batch, -1).contiguous(),
            smoothed=low,
            statistic=low,
            alarm=torch.zeros(batch, dtype=torch.bool, device=device),
            step=nothing,
            clear_point=nothing - 1,
            finite=torch.ones(batch, dtype=torch.bool, device=device),
            recent=recent.expand(batch, -1, -1).contiguous(),
            values=torch.full((batch, config.hits - 1), config.first_value, device=device),
        )

    def value(self, level: Tensor) -> Tensor:
        """Join all levels, [..., n_levels], to one number in benign deviations, [...]."""
        per_head = torch.addcmul(self._shift, level, self._inverse_scale)
        return per_head.select(-1, 0) if self._is_plain else per_head.amax(-1)

    def is_over(self, level: Tensor) -> Tensor:
        """Say where a level [batch, n_levels] alarms or is not finite, [batch] bool, unread.

        Clamped to what is finite and no alarm, each of these is another number than before.
        """
        per_head = torch.addcmul(self._shift, level, self._inverse_scale)
        lowest, highest = self._bounds
        over = per_head.clamp(lowest, highest) != per_head
        return over.select(-1, 0) if self._is_plain else over.any(-1)

    @cached_property
    def _bounds(self) -> tuple[Tensor, Tensor]:
        largest = torch.finfo(torch.float32).max
        highest = self.threshold.clamp(max=largest)
        highest = highest if highest.ndim == 0 else highest[:, None]
        return torch.full_like(highest, -largest), highest

    def step(
        self,
        state: MonitorState,
        logits: Tensor,
        active: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> MonitorState:
        """Consume one score a row. Pure: returns a new state and changes nothing.

        Args:
            state: Where the rows stand.
            logits: [batch, K] float32 on the state's device.
            active: [batch] bool, rows that consume; the others keep their state whatever
                their logits hold, NaN included. None: all rows.
            shift: [batch] by how much the values are lowered; None: by nothing.

        Returns:
            The new state. No host wait is needed for it.
        """
        level, recent = self._level(state, logits)
        value = self.value(level)
        if self.config.boundary:
            value = value - self._boundary[state.step.clamp_max(len(self._boundary) - 1)]
        if shift is not None:
            value = value - shift
        # x - x is NaN for NaN and Inf alike; the sum over heads lets no head hide behind a max.
        # A level that was once NaN or Inf never becomes finite again, but for those of windows.
        residue = level - level
        sound = (residue[:, 0] if self._is_plain else residue.sum(-1)) == 0
        smoothed, values = value, state.values
        if self.config.hits > 1:
            values = torch.cat([state.values, value[:, None]], dim=1)
            smoothed, values = values.amin(-1), values[:, 1:]
        statistic = torch.maximum(state.statistic, smoothed)
        new = MonitorState(
            ema=level,
            smoothed=smoothed,
            statistic=statistic,
            alarm=statistic > self.threshold,
            step=state.step + 1,
            clear_point=torch.where(value < self.config.low_mark, state.step, state.clear_point),
            finite=sound & state.finite if self.config.kind in HARD_TO_UNDO else sound,
            recent=recent,
            values=values,
        )
        return new if active is None else _chosen(active, new, state)

    def path(self, logits: Tensor) -> Tensor:
        """Smooth whole responses at once, from the start; differentiable, what `step` yields.

        A moving average is one product with a matrix of weights, [T, T]: for search and fitting,
        where responses are short and a step at a time costs more than the model.

        Args:
            logits: [batch, T, K] float32.

        Returns:
            [batch, T] the statistic before its running maximum, equal to that of `step` up to
            rounding.
        """
        config = self.config
        state = self.start(logits.shape[0], logits.device)
        if not config.is_moving_average:
            smoothed = []
            for one in logits.unbind(1):
                state = self.step(state, one)
                smoothed.append(state.smoothed)
            return torch.stack(smoothed, dim=1)
        ages = torch.arange(logits.shape[1], device=logits.device)
        between = (ages[:, None] - ages).double()
        kept = 1.0 - config.smoothing
        weights = (config.smoothing * kept ** between.clamp_min(0)).tril().float()
        first = (kept ** (ages + 1).double()).float()[:, None] * state.ema[:, None]
        return self.value(weights @ logits + first)

    def _level(self, state: MonitorState, logits: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        if config.kind == "ema":
            return moved(config, state.ema, logits, config.smoothing), state.recent
        if config.kind == "mean":
            # Summed anew each time: a running sum would gather rounding over the response.
            window = torch.cat([state.recent, logits[:, None]], dim=1)
            return window.mean(dim=1), window[:, 1:]
        if config.kind in ("shrunk", "bank"):
            gain = (state.step + (config.window + 1)).reciprocal()[:, None]
            return moved(config, state.ema, logits, gain), state.recent
        if config.kind == "top":
            return self._best_windows(state, logits)
        # Clamping would make 0 of -inf: the last term is 0, or NaN where a logit is not finite.
        grown = state.ema + (logits - self._forgiven)
        return grown.clamp_min(0) + (logits - logits), state.recent

    def _best_windows(self, state: MonitorState, logits: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        sums = state.recent[:, -1] + (logits - self._start)
        current = self._start + sums / config.window
        windows = torch.cat([state.recent[:, :-1], current[:, None]], dim=1)
        best = windows.topk(config.best, dim=1).values
        ends = ((state.step + 1) % config.window == 0)[:, None, None]
        going_on = torch.cat([state.recent[:, :-1], sums[:, None]], dim=1)
        ended = torch.cat([best, torch.zeros_like(sums)[:, None]], dim=1)
        # What is not among the best is left out, but not that it was NaN or infinite.
        return best.mean(dim=1) + (logits - logits), torch.where(ends, ended, going_on)


def moved(config: MonitorConfig, level: Tensor, logits: Tensor, gain: float | Tensor) -> Tensor:
    """Move the level of an average, a shrunk mean or a bank of both towards logits.

    Args:
        config: Of one of these kinds.
        level: [batch, n_levels].
        logits: [batch, K] float32.
        gain: Weight of the newest logit, a number or [batch, 1]; of a bank that in its mean.
    """
    if config.kind != "bank":
        return torch.lerp(level, logits, gain)
    means, averages = level.chunk(2, dim=-1)
    both = torch.lerp(means, logits, gain), torch.lerp(averages, logits, config.smoothing)
    return torch.cat(both, dim=-1)


def _chosen(active: Tensor, new: MonitorState, old: MonitorState) -> MonitorState:
    """Take the new state of active rows, the old one of the others."""
    chosen = []
    for after, before in zip(new, old, strict=True):
        mask = active.view(-1, *(1,) * (after.ndim - 1))
        chosen.append(torch.where(mask, after, before) if after.numel() else after)
    return MonitorState(*chosen)
