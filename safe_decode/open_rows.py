"""Which rows of a running loop still count, and where the others have ended.

Knows rows that are parked, that close and that have ended. Does not know scores, forwards or
models. Everything is a tensor on the rows' device, None where all rows are alike, so that the
steps in which nothing happens pay nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import and_

import torch
from torch import Tensor

from safe_decode.errors import BeatError, GuardError
from safe_decode.session import Session

__all__ = ["OpenRows"]


class OpenRows:
    """The rows of one session, as its loop goes on.

    Args:
        session: Parks rows.

    Attributes:
        active: [batch] bool, rows whose newest token the next forward judges; None: every row.
        closing: [batch] bool, rows that have ended and are judged once more; None: not sorted yet.
        parked: [batch] bool, rows that have tripped or failed; None: no row.
        pads_after_end: Whether a row that has ended goes on with pads.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.active: Tensor | None = None
        self.closing: Tensor | None = None
        self.parked: Tensor | None = None
        self.pads_after_end = False
        self._end: Tensor | None = None
        self._ended_at = torch.empty(0)
        self._is_unsorted = False  # a row was parked since `go_on`
        self._read: tuple[Tensor, list[bool], bool] | None = None

    def begin(self, input_ids: Tensor, end_ids: Sequence[int], *, pads_after_end: bool) -> None:
        """Get ready for a prompt [batch, seq] that may end with `end_ids`.

        Raises:
            BeatError: It has another batch than the session.
        """
        if input_ids.shape[0] != self._session.batch:
            raise BeatError(
                f"generate runs {input_ids.shape[0]} rows, the session {self._session.batch}; "
                "open it for the expanded batch."
            )
        self.pads_after_end = pads_after_end
        if end_ids:
            self._end = torch.tensor(end_ids, device=input_ids.device)
        self._ended_at = input_ids.new_full(input_ids.shape[:1], -1)

    @property
    def closes(self) -> bool:
        """Say whether a row whose guard fails is closed."""
        return self._session.protects and self._session.policy.on_error == "close"

    @property
    def are_even(self) -> bool:
        """Say whether no row has been parked or has ended."""
        return self.parked is None and self.closing is None

    def go_on_as_they_are(self, *events: Sequence[bool]) -> bool:
        """Say, on the CPU, that `go_on` would change nothing: most steps, whoever has ended.

        Args:
            events: [batch] each: rows that end, trip or are broken, old news among them.
        """
        if self._is_unsorted:
            return False
        if self.active is None:
            return not any(True in flags for flags in events)
        if self._read is None or self._read[0] is not self.active:
            any_closes = self.closing is not None and bool(self.closing.any())
            self._read = self.active, self.active.tolist(), any_closes
        _, counts, any_closes = self._read
        if any_closes:
            return False
        return not any(True in flags and any(map(and_, flags, counts)) for flags in events)

    def counted(self, flags: Tensor) -> Tensor:
        """Leave of `flags` [batch] bool the rows that still count."""
        return flags if self.active is None else flags & self.active

    def and_parked(self, flags: Tensor) -> Tensor:
        """Add the parked rows to `flags` [batch] bool."""
        return flags if self.parked is None else flags | self.parked

    def park(self, row: int, *, said: int, error: GuardError | None = None) -> None:
        """Park a row that tripped, or failed by `error`, behind `said` tokens."""
        self._session.park(row, said=said, error=error)
        if self.parked is None:
            self.parked = torch.zeros_like(self._ended_at, dtype=torch.bool)
        self.parked[row] = True
        self._is_unsorted = True

    def fail(self, error: GuardError, *, said: int) -> None:
        """Close every row that still counts; or note the error, if going on was allowed."""
        session = self._session
        counts = [True] * session.batch if self.active is None else self.active.tolist()
        for row in (row for row, does_count in enumerate(counts) if does_count):
            if self.closes and session.policies[row].protects:
                session.park(row, said=said, error=error)
            session.errors.setdefault(row, error)
        if self.closes:
            parked = torch.tensor([row in session.trips for row in range(session.batch)])
            self.parked = parked.to(self._ended_at.device)

    def go_on(self, newest: Tensor, done: Tensor, n_said: int) -> None:
        """Decide which rows the next forward judges.

        Args:
            newest: [batch] ids that were chosen last.
            done: [batch] bool, rows that these end.
            n_said: Tokens chosen so far.
        """
        self._is_unsorted = False
        active = torch.ones_like(done) if self.active is None else self.active
        if self.parked is not None:
            active = active & ~self.parked
        if self.closing is not None:
            active = active & ~self.closing
        ends = done & (self._ended_at < 0)
        if self.pads_after_end:
            # A row that ends without EOS is judged once more: the next forward reads its tail.
            is_end = torch.zeros_like(done) if self._end is None else torch.isin(newest, self._end)
            active = active & ~(done & is_end)
            self.closing = done & active
        self._ended_at = torch.where(ends, torch.full_like(newest, n_said), self._ended_at)
        self.active = active

    def ends(self, n_said: int) -> list[int]:
        """List how many ids each row has, ends included; waits for the device."""
        ends = self._ended_at.tolist()
        return [end if end >= 0 and self.pads_after_end else n_said for end in ends]
