"""A stream of probe logits turned into one calibrated statistic a row.

Knows smoothing, the running maximum, thresholds and clear points, for any number of
rows at once. Does not know models, tokens, text or what happens after an alarm.

Per head h the logits are smoothed, ema_t = ema_{t-1} + smoothing * (logit_t - ema_{t-1});
smoothed_t = max_h (ema_t[h] - offset[h]) / scale[h]; statistic_t is the running maximum
of smoothed; the alarm is statistic > threshold. State is O(1) a row. `reference` says
the same in plain Python and is what the tensors are tested against.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safe_decode.errors import ConfigurationError

__all__ = [
    "MonitorConfig",
    "MonitorState",
    "ReferenceStep",
    "RiskMonitor",
    "SnapshotRing",
    "reference",
]


@dataclass(frozen=True)
class MonitorConfig:
    """How logits become a statistic; fitted, certified and stored with the probe.

    Attributes:
        smoothing: Weight of the newest logit in the moving average, in (0, 1]; 2 / (M + 1)
            matches a window of M.
        start: [K] where the average starts: the fitted benign mean.
        offset: [K] a_h, subtracted from the average of head h.
        scale: [K] b_h > 0, divides it.
        low_mark: A position is a clear point if its smoothed statistic lies below this.

    Raises:
        ConfigurationError: A value out of range, non-finite, or lengths that differ.
    """

    smoothing: float
    start: tuple[float, ...]
    offset: tuple[float, ...]
    scale: tuple[float, ...]
    low_mark: float

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
        values = (*self.start, *self.offset, *self.scale, self.low_mark)
        if not all(map(math.isfinite, values)) or min(self.scale) <= 0.0:
            raise ConfigurationError(
                f"start={self.start}, offset={self.offset}, scale={self.scale}, "
                f"low_mark={self.low_mark} must be finite and scale positive; fit them again."
            )

    @property
    def n_heads(self) -> int:
        """Count the heads K."""
        return len(self.start)


class MonitorState(NamedTuple):
    """Everything the monitor remembers of each row.

    Attributes:
        ema: [batch, K] float, smoothed logits.
        smoothed: [batch] float, max_h (ema_h - a_h) / b_h, before any maximum over time;
            -inf before the first step.
        statistic: [batch] float, running maximum of smoothed; -inf before the first step.
        alarm: [batch] bool, statistic > threshold.
        step: [batch] int64, scores consumed.
        clear_point: [batch] int64, the last score, counted from 0, whose smoothed statistic
            lay below the low mark; -1 where there was none.
        finite: [batch] bool, False from the first NaN or Inf on.
    """

    ema: Tensor
    smoothed: Tensor
    statistic: Tensor
    alarm: Tensor
    step: Tensor
    clear_point: Tensor
    finite: Tensor

    def row(self, index: int) -> MonitorState:
        """Copy one row out, [1] each."""
        return MonitorState(*(field[index : index + 1].clone() for field in self))


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
        self._is_plain = config.n_heads == 1

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
        self.threshold = self.threshold.to(device)
        self._inverse_scale = self._inverse_scale.to(device)
        self._shift = self._shift.to(device)
        low = torch.full((batch,), -torch.inf, device=device)
        nothing = torch.zeros(batch, dtype=torch.int64, device=device)
        return MonitorState(
            ema=torch.tensor(self.config.start, device=device).expand(batch, -1).contiguous(),
            smoothed=low,
            statistic=low,
            alarm=torch.zeros(batch, dtype=torch.bool, device=device),
            step=nothing,
            clear_point=nothing - 1,
            finite=torch.ones(batch, dtype=torch.bool, device=device),
        )

    def value(self, level: Tensor) -> Tensor:
        """Join the levels of all heads, [..., K], to one number in benign deviations, [...]."""
        per_head = torch.addcmul(self._shift, level, self._inverse_scale)
        return per_head.select(-1, 0) if self._is_plain else per_head.amax(-1)

    def step(
        self, state: MonitorState, logits: Tensor, active: Tensor | None = None
    ) -> MonitorState:
        """Consume one score a row. Pure: returns a new state and changes nothing.

        Args:
            state: Where the rows stand.
            logits: [batch, K] float32 on the state's device.
            active: [batch] bool, rows that consume; the others keep their state whatever
                their logits hold, NaN included. None: all rows.

        Returns:
            The new state. No host wait is needed for it.
        """
        ema = torch.lerp(state.ema, logits, self.config.smoothing)
        smoothed = self.value(ema)
        # x - x is NaN for NaN and Inf alike; the sum over heads lets no head hide behind a max.
        # An average that was once NaN or Inf never becomes finite again, so this latches.
        residue = ema - ema
        sound = (residue[:, 0] if self._is_plain else residue.sum(-1)) == 0
        statistic = torch.maximum(state.statistic, smoothed)
        new = MonitorState(
            ema=ema,
            smoothed=smoothed,
            statistic=statistic,
            alarm=statistic > self.threshold,
            step=state.step + 1,
            clear_point=torch.where(smoothed < self.config.low_mark, state.step, state.clear_point),
            finite=sound,
        )
        if active is None:
            return new
        column = active[:, None]
        return MonitorState(
            torch.where(column, new.ema, state.ema),
            *(torch.where(active, a, b) for a, b in zip(new[1:], state[1:], strict=True)),
        )


class SnapshotRing:
    """The last states of a batch, enough to rewind over a hold-back.

    A state is immutable, so a snapshot is a reference: pushing costs no copy and the
    ring holds `size` states however long the response is.

    Args:
        size: Snapshots kept: hold-back + 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigurationError(f"size={size} keeps no snapshot; pass hold-back + 1.")
        self._states: deque[MonitorState] = deque(maxlen=size)

    def push(self, state: MonitorState) -> None:
        """Remember a state; the oldest goes."""
        self._states.append(state)

    def __len__(self) -> int:
        return len(self._states)

    def row_at(self, row: int, step: int) -> MonitorState | None:
        """Find a row's state after `step` scores, [1] each; None if it is no longer held."""
        for state in reversed(self._states):
            if int(state.step[row]) == step:
                return state.row(row)
        return None


class ReferenceStep(NamedTuple):
    """One step of one row, in plain Python. See `MonitorState` for the words."""

    ema: tuple[float, ...]
    smoothed: float
    statistic: float
    alarm: bool
    clear_point: int
    finite: bool


def reference(
    config: MonitorConfig, threshold: float, logits: Sequence[Sequence[float]]
) -> list[ReferenceStep]:
    """Compute what `RiskMonitor` computes, one row, one number at a time.

    The oracle for tests and for replay. A non-finite logit makes the row non-finite for
    good; its other values are then not meaningful.

    Args:
        config: How logits become a statistic.
        threshold: The row's threshold.
        logits: [T, K], one list a score.
    """
    ema = tuple(config.start)
    statistic, clear_point, finite = -math.inf, -1, True
    steps = []
    for index, heads in enumerate(logits):
        pairs = zip(ema, heads, strict=True)
        ema = tuple(old + config.smoothing * (new - old) for old, new in pairs)
        finite = finite and all(map(math.isfinite, ema))
        smoothed = max(
            (value - a) / b for value, a, b in zip(ema, config.offset, config.scale, strict=True)
        )
        statistic = max(statistic, smoothed)
        clear_point = index if smoothed < config.low_mark else clear_point
        alarm = statistic > threshold
        steps.append(ReferenceStep(ema, smoothed, statistic, alarm, clear_point, finite))
    return steps
