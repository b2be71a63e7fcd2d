"""The monitor on the path of every token: no more than a decision needs while nothing trips.

Knows logits, levels and thresholds of the rows of one session. Does not know features, tokens
or what a trip leads to.

Between two trips only the level (the smoothed logits) has to be kept, and one comparison with
its bounds says that no row alarms and none is broken. All else the monitor knows, its `state`,
is a function of the logits so far: it is computed by `RiskMonitor.step` when somebody asks,
which is after a trip or at the end. Statistics other than moving averages, shrunk means and banks
of both are stepped in full each time. On an accelerator, where asking would wait, trips are
computed on the device and handed on unread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safe_decode.monitor.config import MonitorConfig
from safe_decode.monitor.monitor import MonitorState, RiskMonitor, moved
from safe_decode.monitor.snapshots import SnapshotRing
from safe_decode.policy.policy import Policy

__all__ = ["Trail", "TripDetector"]

_LARGEST = torch.finfo(torch.float32).max
_MARGIN = 1e-4
"""Relative: the bound on a level and the monitor's own comparison round differently, so the
bound lies a little lower and the monitor decides between."""


class Trail(NamedTuple):
    """What the rows went through, [T, batch] each, `logits` [T, batch, K]; on the host.

    Attributes:
        logits: As the probe gave them.
        smoothed: The statistic before the running maximum.
        statistic: The running maximum.
        active: Where the row consumed; elsewhere the others mean nothing.
    """

    logits: Tensor
    smoothed: Tensor
    statistic: Tensor
    active: Tensor


class TripDetector:
    """Steps a batch of rows and says which have tripped.

    Args:
        monitor: Started for the rows' device.
        policy: What counts as a trip.
        state: Where the rows stand.
        n_snapshots: States kept to go back to; None: one more than the policy holds back.
        is_shifted: Values will be lowered step by step; then each is stepped in full.
    """

    def __init__(
        self,
        monitor: RiskMonitor,
        policy: Policy,
        state: MonitorState,
        *,
        n_snapshots: int | None = None,
        is_shifted: bool = False,
    ) -> None:
        self._monitor, self._policy = monitor, policy
        self._first = self._known = state
        self._level = state.ema
        self._gain = _Gain(monitor.config, state)
        self._keeps_levels = monitor.config.level_decides and not is_shifted
        self._shifts: list[Tensor | None] = []
        self._shown: list[tuple[Tensor, Tensor]] = []
        self._logits: list[Tensor] = []
        self._active: list[Tensor | None] = []
        self._levels: list[Tensor] = []
        self._n_known = 0
        self._counts: list[int] = []
        self._n_counted = -1
        self._any_masked = False
        self._ring = SnapshotRing(
            policy.holdback_tokens + 1 if n_snapshots is None else n_snapshots
        )
        self._trips = policy.trips(state.alarm, state.finite)
        self._reads_on_host = state.ema.is_cpu
        if self._reads_on_host:
            self._low = torch.full_like(state.ema, -_LARGEST)
            self._high = _upper_bound(monitor, state)

    def rearranged(
        self,
        sources: Sequence[int | None],
        monitor: RiskMonitor,
        policy: Policy,
        fresh: MonitorState,
        *,
        n_snapshots: int,
    ) -> TripDetector:
        """Go on with other rows in other places.

        Args:
            sources: For each new place, the row that now stands there; None: a new one.
            monitor: With the thresholds of the new places.
            policy: What counts as a trip.
            fresh: The states of new rows, in their places; what it holds elsewhere is not read.
            n_snapshots: States kept to go back to.
        """
        device = fresh.finite.device
        places = torch.tensor([0 if s is None else s for s in sources], device=device)
        new = {i: fresh.row(i) for i, source in enumerate(sources) if source is None}

        def moved(state: MonitorState) -> MonitorState:
            return MonitorState(*(f.index_select(0, places) for f in state)).with_rows(new)

        state = moved(self.state)
        detector = TripDetector(monitor, policy, state, n_snapshots=n_snapshots)
        for held in self._ring:
            detector._ring.push(moved(held))
        return detector

    @property
    def n_scores(self) -> int:
        """Count the steps so far."""
        return len(self._logits)

    @property
    def state(self) -> MonitorState:
        """The monitor's state now; computed from the logits since it was last asked for."""
        new = slice(self._n_known, None)
        for logits, active, shift in zip(
            self._logits[new], self._active[new], self._shifts[new], strict=True
        ):
            self._ring.push(self._known)
            self._known = self._monitor.step(self._known, logits, active, shift)
            if not self._keeps_levels:
                self._shown.append((self._known.smoothed, self._known.statistic))
        self._n_known = len(self._logits)
        return self._known

    def step(
        self, logits: Tensor, active: Tensor | None = None, shift: Tensor | None = None
    ) -> None:
        """Consume one score a row.

        Args:
            logits: [batch, K] float32.
            active: [batch] bool, rows that consume; None: all.
            shift: [batch] by how much values are lowered, if the watch is made for it.
        """
        self._logits.append(logits)
        self._shifts.append(shift)
        self._active.append(active)
        self._any_masked |= active is not None
        if self._keeps_levels:
            gain = self._gain.next(active)
            level = moved(self._monitor.config, self._level, logits, gain)
            if active is not None:
                level = torch.where(active[:, None], level, self._level)
            self._level = level
            self._levels.append(level)

    def trips(self, n_scores: int = 1) -> Tensor:
        """Say which rows have tripped, now or before.

        Args:
            n_scores: Scores consumed since this was last asked, at least 1.

        Returns:
            [batch] bool on the rows' device.
        """
        if not self._keeps_levels:
            pass
        elif self._reads_on_host:
            if self._is_within(n_scores):
                return self._trips
            # An alarm is latched: what such a row does next tells nothing new.
            latched = self.state.alarm[:, None]
            self._high = torch.where(latched, self._high.new_tensor(_LARGEST), self._high)
        elif n_scores == 1 and self._policy.on_error == "close":
            over, active = self._monitor.is_over(self._level), self._active[-1]
            # A row that has consumed nothing stands where it starts, which may lie over a bound.
            self._trips = self._trips | (over if active is None else over & active)
            return self._trips
        self._trips = self._policy.trips(self.state.alarm, self.state.finite)
        return self._trips

    def snapshot(self, row: int, n_scores: int) -> MonitorState | None:
        """Find a row's state after `n_scores` scores, [1] each; None if it is no longer held."""
        assert self._n_known == len(self._logits), "whoever asks has asked for the state"
        return self._ring.row_at(row, n_scores)

    def consumed(self, row: int) -> int:
        """Count the scores a row has consumed here. Waits for the device if some rows rested."""
        if not self._any_masked:
            return len(self._logits)
        if self._n_counted != len(self._logits):
            self._counts, self._n_counted = self._masks().sum(0).tolist(), len(self._logits)
        return self._counts[row]

    def trail(self) -> Trail:
        """Compute what traces show, of at least one score; one copy to the host for all rows."""
        masks = self._masks()
        if self._keeps_levels:
            smoothed = self._monitor.value(torch.stack(self._levels))
            counted = smoothed.masked_fill(~masks, -torch.inf) if self._any_masked else smoothed
            statistic = torch.maximum(counted.cummax(0).values, self._first.statistic)
        else:
            _ = self.state
            smoothed, statistic = (torch.stack(shown) for shown in zip(*self._shown, strict=True))
        logits = torch.stack(self._logits)
        # One copy for all.
        numbers = torch.stack([smoothed, statistic, masks.float()], -1)
        host = torch.cat([logits, numbers.to(logits.dtype)], -1).cpu()
        return Trail(host[..., :-3], host[..., -3], host[..., -2], host[..., -1] != 0)

    def _is_within(self, n_scores: int) -> bool:
        level = self._level if n_scores == 1 else torch.stack(self._levels[-n_scores:])
        # A clamped NaN or Inf is not what it was.
        return torch.equal(level.clamp(self._low, self._high), level)

    def _masks(self) -> Tensor:
        everyone = torch.ones_like(self._first.finite)
        return torch.stack([everyone if mask is None else mask for mask in self._active])


class _Gain:
    """The weight of the newest logit in the level.

    Of an average always the same, of a shrunk mean or a bank that of one among all so far. While
    rows have consumed equally many on the host, it is one number.
    """

    def __init__(self, config: MonitorConfig, state: MonitorState) -> None:
        self._window = config.window if config.kind in ("shrunk", "bank") else None
        self._smoothing = config.smoothing
        self._taken: int | Tensor = state.step
        if self._window is not None and state.step.is_cpu and len(set(state.step.tolist())) == 1:
            self._taken = int(state.step[0])

    def next(self, active: Tensor | None) -> float | Tensor:
        """Return the weights of the next logits, a number or [batch, 1]."""
        if self._window is None:
            return self._smoothing
        if active is not None and isinstance(self._taken, int):
            self._taken = torch.full_like(active, self._taken, dtype=torch.int64)
        before = self._taken + (self._window + 1)
        self._taken = self._taken + (1 if active is None else active)
        return 1.0 / before if isinstance(before, int) else before.reciprocal()[:, None]


def _upper_bound(monitor: RiskMonitor, state: MonitorState) -> Tensor:
    """[batch, n_levels]: a level that exceeds this may be an alarm, one that does not is none."""
    config, device = monitor.config, state.ema.device
    scale = torch.tensor(config.scale, dtype=torch.float64, device=device)
    offset = torch.tensor(config.offset, dtype=torch.float64, device=device)
    threshold = monitor.threshold.double().expand(len(state.ema))[:, None]
    bound = threshold * scale + offset
    bound = bound - _MARGIN * (bound.abs() + scale + offset.abs())
    return bound.clamp(-_LARGEST, _LARGEST).float()
