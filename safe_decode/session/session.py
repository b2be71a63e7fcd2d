"""The rows of one generation: their beats, their scores, their trips.

Knows features, logits, monitor states and which rows still count. Does not know a
`generate` call, token ids or text: whoever drives it says when a forward was due and which
rows it belongs to. Nothing is shared between sessions; nothing is left on a model.

While nothing trips, a step is a few tensor operations on the rows' device; what the monitor
knows besides is computed when a row trips, and records for traces after the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from safe_decode.activations.tap import ForwardRecorder
from safe_decode.errors import BeatError, ConfigurationError, GuardError, NonFiniteError
from safe_decode.monitor.monitor import MonitorState, RiskMonitor
from safe_decode.policy.policy import Policy
from safe_decode.policy.reasoning import SpanReader
from safe_decode.policy.redirect import cut_of
from safe_decode.policy.self_check import Look
from safe_decode.probe.linear import LinearProbe
from safe_decode.session.records import RowRecord, Trip
from safe_decode.session.trip_detector import TripDetector

__all__ = ["RowRecord", "Session", "Trip"]


class Session:
    """Judges the rows of one generation.

    Args:
        probe: On the device of the features.
        monitor: With the rows' thresholds.
        policy: What a trip leads to, for all rows or one each.
        beats: Of a tap that listens to this context.
        scanned: For each row, how many trailing positions of the prefill are judged.
        device: Where the rows' state lives.
        resume: State to go on from, [batch] each; None: start anew.
        spans: Follows marked reasoning; then `note` tells each forward's ids. None: there is none.
    """

    def __init__(
        self,
        *,
        probe: LinearProbe,
        monitor: RiskMonitor,
        policy: Policy | Sequence[Policy],
        beats: ForwardRecorder,
        scanned: Sequence[int],
        device: torch.device,
        resume: MonitorState | None = None,
        spans: SpanReader | None = None,
    ) -> None:
        self.scanned = tuple(scanned)
        self.policies = _one_each(policy, len(self.scanned))
        self.policy = self.policies[0]
        protects = [own.protects for own in self.policies]
        self.protects = any(protects)
        # None where all rows agree, so that they pay nothing for rows that differ.
        self.protected = None if len(set(protects)) == 1 else torch.tensor(protects, device=device)
        fresh = monitor.start(len(self.scanned), device)
        self.trips: dict[int, Trip] = {}
        self.errors: dict[int, GuardError] = {}
        self.looks: Mapping[int, Sequence[Look]] = {}
        self._content: dict[int, int] = {}
        self._probe, self._monitor, self._beats = probe, monitor, beats
        start = fresh if resume is None else resume
        self._before = start.step.tolist()
        most = max(own.holdback_tokens for own in self.policies)
        self._watch = TripDetector(
            monitor, self.policy, start, n_snapshots=most + 1, is_shifted=spans is not None
        )
        self._spans, self._columns = spans, 0
        self._shift: Tensor | None = None
        self._step_shape = torch.Size((len(self.scanned), len(beats.columns)))
        self._is_prefilled = False
        beats.keep_last(max(self.scanned))

    @cached_property
    def _spread(self) -> Callable[[Tensor], Tensor]:
        return self._probe.over_whole_activations(self._beats.columns, self._beats.n_columns)

    @property
    def is_quiet(self) -> bool:
        """Say whether no row has tripped; False where the host cannot know without waiting."""
        return self._watch.is_quiet

    @property
    def state(self) -> MonitorState:
        """What the monitor knows of each row now."""
        return self._watch.state

    @property
    def batch(self) -> int:
        """Count the rows."""
        return len(self.scanned)

    @property
    def is_prefilled(self) -> bool:
        """Say whether the prompt has been judged."""
        return self._is_prefilled

    def judged(self, row: int) -> int:
        """Count the generated tokens of a row that have a score, unseen ones included."""
        return self._watch.consumed(row) - self.scanned[row]

    def close(self, row: int, content: int) -> None:
        """Complete a row's response: what is judged behind so many tokens is never shown."""
        self._content.setdefault(row, content)

    def judge(self, positions: Sequence[int], active: Tensor | None = None) -> Tensor:
        """Judge the one forward since the last call.

        The first call judges, in order, each row's last `scanned` positions.

        Args:
            positions: How many positions the forward may have had.
            active: [batch] bool, rows whose newest token this forward read; None: all.

        Returns:
            [batch] bool on the rows' device: rows that trip now or tripped before. In flag
            mode too.

        Raises:
            BeatError: No forward, more than one, one of another length or batch, or sites
                that fired unequally.
            ConfigurationError: Features do not fit the probe.
        """
        if not self._is_prefilled:
            return self._judge_prefill(positions)
        features = self._beats.take_step() if 1 in positions else None
        if features is None:
            # All but the way of a plain step looks closer, and says what is wrong.
            logits = self._probe(self._features(positions)[:, -1])
        elif features.shape == self._step_shape:
            logits = self._probe.unchecked(features)  # the prefill's were checked
        elif features.shape[0] != self.batch:
            raise self._foreign_batch(features)
        else:
            logits = self._spread(features)
        self._watch.step(logits, active, None if self._shift is None else self._shift[:, -1])
        return self._watch.trips()

    def note(self, ids: Tensor, new_tokens: int | None = None) -> None:
        """Take note of the ids that the next forward to be judged has read.

        Args:
            ids: [batch, seq] everything so far, padding included.
            new_tokens: Of whole responses, columns of answers; None: as they are written.
        """
        if self._spans is None:
            return
        n_columns = 1
        if not self._is_prefilled:
            n_columns = max(self.scanned) + (new_tokens or 0)
            self._columns = ids.shape[1] - (new_tokens or 0)
        self._shift = self._spans.shift(ids, n_columns)

    def closing(self, row: int) -> tuple[int, ...]:
        """Return the ids that close the span in which a row stands; empty outside of one."""
        return () if self._spans is None else self._spans.closing(row)

    def _shift_at(self, position: int) -> Tensor | None:
        return None if self._shift is None else self._shift[:, position]

    def discard(self) -> None:
        """Forget the forwards since the last `judge`; another one judges what they would."""
        self._beats.discard()

    def expect_whole(self, new_tokens: int) -> None:
        """Make ready, before its forward, for `judge_whole` of so many columns of answers."""
        self._beats.discard()
        self._beats.keep_last(new_tokens + max(self.scanned))

    def judge_whole(self, width: int, content: Sequence[int]) -> None:
        """Judge finished responses in the one forward since the last call; park what trips.

        Each row's scores are read in order, as while generating, up to its trip.

        Args:
            width: Columns of the forward.
            content: [batch] tokens of each response, end ids not counted.

        Raises:
            BeatError: As `judge`.
            ConfigurationError: As `judge`.
        """
        longest = max(self.scanned)
        logits = self._probe(self._features((width,)))
        self._is_prefilled = True
        begins = torch.tensor([longest - n for n in self.scanned], device=logits.device)
        ends = torch.tensor([longest + n for n in content], device=logits.device)
        open_rows = torch.ones_like(begins, dtype=torch.bool)
        for position in range(longest + max(content)):
            active = (begins <= position) & (position < ends) & open_rows
            self._watch.step(logits[:, position], active, self._shift_at(position))
            trips = self._watch.trips() & active
            if self.protected is not None:
                trips = trips & self.protected
            if self.protects and bool(trips.any()):
                for row in trips.nonzero()[:, 0].tolist():
                    self.park(row, said=max(0, position - longest + 1))
                open_rows = open_rows & ~trips

    def require_quiet(self) -> None:
        """Check that no forward passed since the last `judge`.

        Raises:
            BeatError: One did.
        """
        if self._beats.positions or self._beats.forwards:
            raise BeatError(
                f"{self._beats.forwards} forwards over {self._beats.positions} positions passed "
                "after the last choice, wanted none; mark your own with safe_decode.unwatched()."
            )

    def park(self, row: int, *, said: int, error: GuardError | None = None) -> None:
        """Record a row's trip; a second one changes nothing.

        Args:
            row: Which row.
            said: Generated tokens it has, not counting one chosen after the tripping score.
            error: What failed; None: the newest score raised the alarm.
        """
        if row in self.trips:
            return
        before, scanned, state = self._before[row], self.scanned[row], self.state
        if error is None and not bool(state.finite[row]):
            error = _non_finite(row, self.judged(row) + scanned - 1)
        # The newest score passed nothing if it tripped or is NaN; it is absent if the guard failed.
        tripped = 1 if error is None or isinstance(error, NonFiniteError) else 0
        judged = max(0, min(said, self.judged(row) - tripped))
        clear = max(0, int(state.clear_point[row]) + 1 - before - scanned)
        policy = self.policies[row]
        kind = policy.redirect
        if error is not None:
            kind = policy.rule.if_guard_fails
        cut = cut_of(
            kind,
            said=said,
            judged=judged,
            clear=clear,
            holdback_tokens=policy.holdback_tokens,
            content=self._content.get(row),
        )
        snapshot = self._watch.snapshot(row, before + scanned + cut.kept) if cut.kept else None
        self.trips[row] = Trip(cut, snapshot, error)
        if error is not None:
            self.errors[row] = error

    def records(self) -> list[RowRecord]:
        """Build what each row's trace needs; one copy to the host for the whole batch."""
        thresholds = self._monitor.threshold.expand(self.batch).tolist()
        if not self._watch.n_scores:
            return [self._record(row, thresholds[row], [], [], []) for row in range(self.batch)]
        trail = self._watch.trail()
        return [
            self._record(
                row,
                thresholds[row],
                trail.logits[active, row].tolist(),
                trail.smoothed[active, row].tolist(),
                trail.statistic[active, row].tolist(),
            )
            for row, active in enumerate(trail.active.unbind(1))
        ]

    def _record(
        self,
        row: int,
        threshold: float,
        logits: list[list[float]],
        smoothed: list[float],
        statistic: list[float],
    ) -> RowRecord:
        broken = next((i for i, value in enumerate(smoothed) if not math.isfinite(value)), None)
        if broken is not None:
            # Where errors are allowed nothing was parked, and nothing else would tell.
            self.errors.setdefault(row, _non_finite(row, broken))
        return RowRecord(
            scanned=min(self.scanned[row], len(statistic)),
            logits=logits,
            smoothed=smoothed,
            statistic=statistic,
            threshold=threshold,
            alarm=next((i for i, value in enumerate(statistic) if value > threshold), None),
            trip=self.trips.get(row),
            error=self.errors.get(row),
            looks=tuple(self.looks.get(row, ())),
            inside=self._inside(row, len(statistic)),
            ahead=self._ahead(row, len(statistic)),
        )

    def _ahead(self, row: int, n_scores: int) -> int:
        content = self._content.get(row)
        return 0 if content is None else max(0, n_scores - self.scanned[row] - content)

    def _inside(self, row: int, n_scores: int) -> tuple[bool, ...]:
        if self._spans is None:
            return ()
        first = self._columns - self.scanned[row]
        return tuple(self._spans.inside(row, first + index) for index in range(n_scores))

    def _features(self, positions: Sequence[int]) -> Tensor:
        heard, seen = self._beats.forwards, self._beats.positions
        # A prompt may pass in chunks; a token passes once.
        if (heard > 1 and self._is_prefilled) or (heard and seen not in positions):
            self._beats.discard()
            raise BeatError(
                f"{heard} forwards over {seen} positions passed before one choice, wanted one "
                f"over {' or '.join(map(str, positions))}; each token has exactly one score."
            )
        features = self._beats.take()
        if features.shape[0] != self.batch:
            raise self._foreign_batch(features)
        return features

    def _foreign_batch(self, features: Tensor) -> BeatError:
        return BeatError(
            f"a forward had {features.shape[0]} rows, the session {self.batch}; "
            "open a session for the batch that generate runs."
        )

    def _judge_prefill(self, positions: Sequence[int]) -> Tensor:
        logits = self._probe(self._features(positions))
        self._beats.keep_last(1)
        self._is_prefilled = True
        width = logits.shape[1]
        waits = torch.tensor([width - n for n in self.scanned], device=logits.device)
        uneven = len(set(self.scanned)) > 1
        for position in range(width):
            active = waits <= position if uneven else None
            self._watch.step(logits[:, position], active, self._shift_at(position))
        return self._watch.trips(width)


def _one_each(policy: Policy | Sequence[Policy], batch: int) -> tuple[Policy, ...]:
    policies = (policy,) * batch if isinstance(policy, Policy) else tuple(policy)
    if len(policies) != batch:
        raise ConfigurationError(
            f"policy has {len(policies)} entries for {batch} rows; pass one for each row."
        )
    if len({own.on_error for own in policies}) > 1:
        raise ConfigurationError("on_error differs between rows; pass one value for the batch.")
    return policies


def _non_finite(row: int, score: int) -> NonFiniteError:
    return NonFiniteError(
        f"row {row} has NaN or Inf at score {score}, wanted finite activations; check the model's "
        "weights and dtype."
    )
