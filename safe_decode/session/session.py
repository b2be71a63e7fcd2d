"""The rows of one generation: their scores and their trips.

Knows logits, monitor states and which rows still count. Does not know a `generate` call, ids or
text: whoever drives it says when a forward was due and which rows it belongs to. Nothing is shared
between sessions, or left on a model.

While nothing trips, a step is a few tensor operations on the rows' device; what the monitor
knows besides is computed when a row trips, and records for traces after the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safe_decode.activations.tap import ForwardRecorder
from safe_decode.errors import ConfigurationError, GuardError
from safe_decode.host_copies import sent
from safe_decode.monitor.monitor import MonitorConfig, MonitorState
from safe_decode.policy.reasoning import SpanReader
from safe_decode.policy.self_check import Look
from safe_decode.probe.interface import Probe
from safe_decode.session.batch_update import BatchUpdate, JoiningRow, Rearrangement
from safe_decode.session.forward_reader import ForwardReader
from safe_decode.session.history import History, non_finite
from safe_decode.session.records import RowRecord, SessionRow, Trip
from safe_decode.session.roster import Roster
from safe_decode.session.span_shifts import SpanShifts
from safe_decode.session.trip_detector import TripDetector
from safe_decode.session.trip_log import TripLog

__all__ = ["BatchUpdate", "JoiningRow", "RowRecord", "Session", "SessionRow", "Trip"]


class Session:
    """Judges the rows of one generation.

    Args:
        probe: On the device of the features.
        config: The monitor's.
        rows: What holds for each row.
        recorder: Of a tap that listens to this context.
        device: Where the rows' state lives.
        spans: Follows marked reasoning; then `note` tells each forward's ids. None: there is none.

    Attributes:
        roster: What holds for the rows.
        looks: Self-checks of alarms, by row.
        reader: Of the forwards.
        spans: Of marked reasoning.

    Raises:
        ConfigurationError: Rows that cannot share a batch.
    """

    def __init__(
        self,
        *,
        probe: Probe,
        config: MonitorConfig,
        rows: Sequence[SessionRow],
        recorder: ForwardRecorder,
        device: torch.device,
        spans: SpanReader | None = None,
    ) -> None:
        self.reader = ForwardReader(probe, recorder)
        self.roster = Roster.of(rows, config, device)
        self.looks: Mapping[int, Sequence[Look]] = {}
        self.spans = SpanShifts(spans)
        start = self.roster.start()
        self._log, self._history = TripLog(self.roster.begun()), History(len(rows))
        self._detector = TripDetector(
            self.roster.monitor,
            rows[0].policy,
            start,
            n_snapshots=self.roster.n_snapshots,
            is_shifted=spans is not None,
        )
        self.reader.keep_last(max(self.roster.scanned))

    @property
    def trips(self) -> Mapping[int, Trip]:
        """The trips of the rows that have tripped, by row."""
        return self._log.trips

    @property
    def errors(self) -> dict[int, GuardError]:
        """What failed, by row."""
        return self._log.errors

    @property
    def parked(self) -> Tensor | None:
        """[batch] bool, the rows that have tripped, on their device; None: none has."""
        return self._log.parked

    @property
    def state(self) -> MonitorState:
        """What the monitor knows of each row now."""
        return self._detector.state

    @property
    def batch(self) -> int:
        """Count the rows."""
        return len(self.roster.rows)

    def judged(self, row: int) -> int:
        """Count the generated tokens of a row that have a score, unseen ones included."""
        return self._history.consumed(row, self._detector) - self.roster.scanned[row]

    def close(self, row: int, content: int) -> None:
        """Complete a row's response: what is judged behind so many tokens is never shown."""
        self._log.content.setdefault(row, content)

    def judge(self, positions: Sequence[int], active: Tensor | None = None) -> Tensor:
        """Judge the one forward since the last call.

        The first call judges, in order, each row's last `scanned` positions.

        Args:
            positions: How many positions the forward may have had.
            active: [batch] bool, rows whose newest token this forward read; None: all.

        Returns:
            [batch] bool on the rows' device: rows that trip now or before; in flag mode too.

        Raises:
            BeatError: No forward, more than one, one of another length or batch, or sites
                that fired unequally.
            ConfigurationError: Features do not fit the probe.
        """
        if not self.reader.is_prefilled:
            return self._judge_prompt(self.reader.prompt(positions, self.batch))
        logits = self.reader.token(positions, self.batch)
        self._detector.step(logits, active, self.spans.at(-1))
        return self._detector.trips()

    def judge_features(self, features: Tensor, active: Tensor | None = None) -> Tensor:
        """Judge one token of each row, its features being read by somebody else.

        Args:
            features: [batch, F] in the order of the probe's sites.
            active: [batch] bool, rows that these belong to; None: all.

        Returns:
            As `judge`.

        Raises:
            BeatError: Another batch than the session's.
            ConfigurationError: Features do not fit the probe.
        """
        self._detector.step(self.reader.given(features, self.batch), active, self.spans.at(-1))
        return self._detector.trips()

    def update(self, change: BatchUpdate) -> list[RowRecord]:
        """Let rows leave, join and move between two tokens.

        Rows that stay keep their scores, states and snapshots. The prompt of a row that joins is
        judged here.

        Returns:
            The records of the rows that left, in the order in which `change` names them.

        Raises:
            ConfigurationError: A change that `Rearrangement.of` refuses, or rows whose reasoning
                or self-checks are followed, which stay together.
        """
        if self.spans.are_followed or self.looks:
            raise ConfigurationError(
                "rows of a session that follows reasoning or self-checks cannot leave, join or "
                "move; open a session for each batch."
            )
        moved = Rearrangement.of(self.batch, change)
        stay, old = self.roster.rows, self._detector
        rows = [moved.joining[i].row if s is None else stay[s] for i, s in enumerate(moved.sources)]
        # What may be refused comes first, so that a refused change changes nothing.
        roster = Roster.of(rows, self.roster.monitor.config, self.roster.device)
        prompts = {
            row: self.reader.given(one.prompt_features, one.row.scanned)
            for row, one in moved.joining.items()
        }
        records, start = self.records(), roster.start()
        self._history.settle(old)
        self._history.rearrange(moved.sources)
        self._log.rearrange(moved, roster.begun(), start.finite)
        self.roster = roster
        self._detector = old.rearranged(
            moved.sources, roster.monitor, rows[0].policy, start, n_snapshots=roster.n_snapshots
        )
        self._judge_prompts(prompts)
        return [records[row] for row in change.removed]

    def _judge_prompts(self, prompts: Mapping[int, Tensor]) -> None:
        """Judge the logits [scanned, K] of new rows' prompts, all ending at one position."""
        longest = max(map(len, prompts.values()), default=0)
        n_heads = self.roster.monitor.config.n_heads
        for position in range(longest):
            active = torch.zeros(self.batch, dtype=torch.bool, device=self.roster.device)
            scores = torch.zeros(self.batch, n_heads, device=self.roster.device)
            for row, logits in prompts.items():
                at = position - (longest - len(logits))
                if at >= 0:
                    active[row], scores[row] = True, logits[at]
            self._detector.step(scores, active)
        if longest:
            self._detector.trips(longest)

    def note(self, ids: Tensor, new_tokens: int | None = None) -> None:
        """Take note of the ids that the next forward to be judged has read.

        Args:
            ids: [batch, seq] everything so far, padding included.
            new_tokens: Of whole responses, columns of answers; None: as they are written.
        """
        width = 0 if self.reader.is_prefilled else max(self.roster.scanned)
        self.spans.note(ids, scanned=width, new_tokens=new_tokens or 0)

    def expect_whole(self, new_tokens: int) -> None:
        """Make ready, before its forward, for `judge_whole` of so many columns of answers."""
        self.reader.discard()
        self.reader.keep_last(new_tokens + max(self.roster.scanned))

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
        longest = max(self.roster.scanned)
        logits = self.reader.whole(width, self.batch)
        begins = torch.tensor([longest - n for n in self.roster.scanned], device=logits.device)
        ends = torch.tensor([longest + n for n in content], device=logits.device)
        open_rows = torch.ones_like(begins, dtype=torch.bool)
        for position in range(longest + max(content)):
            active = (begins <= position) & (position < ends) & open_rows
            self._detector.step(logits[:, position], active, self.spans.at(position))
            trips = self._detector.trips() & active
            if self.roster.protected is not None:
                trips = trips & self.roster.protected
            if self.roster.protects and bool(trips.any()):
                for row in trips.nonzero()[:, 0].tolist():
                    self.park(row, said=max(0, position - longest + 1))
                open_rows = open_rows & ~trips

    def park(self, row: int, *, said: int, error: GuardError | None = None) -> None:
        """Record a row's trip; a second one changes nothing.

        Args:
            row: Which row.
            said: Generated tokens it has, not counting one chosen after the tripping score.
            error: What failed; None: the newest score raised the alarm.
        """
        if row in self.trips:
            return
        judged = self.judged(row)
        if error is None and not bool(self.state.finite[row]):
            error = non_finite(row, judged + self.roster.scanned[row] - 1)
        self._log.park(
            row, self.roster.rows[row], self._detector, said=said, judged=judged, error=error
        )

    def records(self) -> list[RowRecord]:
        """Build what each row's trace needs; one copy to the host for the whole batch."""
        records = []
        thresholds = torch.tensor([row.threshold for row in self.roster.rows]).tolist()
        for row, column in enumerate(self._history.columns(self._detector)):
            if column.first_broken is not None:
                # Where errors are allowed nothing was parked, and nothing else would tell.
                self.errors.setdefault(row, non_finite(row, column.first_broken))
            record = column.record(
                scanned=self.roster.scanned[row],
                threshold=thresholds[row],
                trip=self.trips.get(row),
                error=self.errors.get(row),
                looks=tuple(self.looks.get(row, ())),
                inside=self.spans.inside(row, self.roster.scanned[row], len(column.statistic)),
                content=self._log.content.get(row),
            )
            records.append(record)
        return records

    def _judge_prompt(self, logits: Tensor) -> Tensor:
        width, scanned = logits.shape[1], self.roster.scanned
        uneven = len(set(scanned)) > 1
        waits = sent([width - n for n in scanned], logits.device) if uneven else None
        for position in range(width):
            active = None if waits is None else waits <= position
            self._detector.step(logits[:, position], active, self.spans.at(position))
        return self._detector.trips(width)
