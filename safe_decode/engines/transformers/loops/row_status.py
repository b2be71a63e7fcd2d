"""Which rows of a running loop still count, where the others have ended, and by whom.

Knows rows that are parked, that look ahead, that close and that have ended. Does not know
scores, forwards or models. Everything is a tensor on the rows' device, None where all rows are
alike, so that the steps in which nothing happens pay nothing.

A row that the model itself ends is over. A row that somebody else ends (a cap, a stop string, a
clock, a criterion) goes on unseen for k tokens, its hold-back, so that its last words are judged
as in the middle of a longer answer; then its last token is judged once more, and it is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safe_decode.errors import BeatError, GuardError
from safe_decode.session.session import Session
from safe_decode.session.turns import RowEnd, Turn, Turns

__all__ = ["EndIds", "RowStatus"]

_TURNS: tuple[Turn, ...] = ("says", "cut", "looks", "ends", "stops")


class EndIds(NamedTuple):
    """Ids that end a row.

    Attributes:
        all: Of the call.
        own: Those of them at which the model itself ends its turn.
    """

    all: tuple[int, ...]
    own: tuple[int, ...]


@dataclass(frozen=True)
class _State:
    """All rows after one choice, [batch] each.

    Attributes:
        latched: Rows that bare `generate` has ended, or that are parked.
        active: Rows whose newest token the next forward judges.
        closing: Of them, those that are over once it is judged.
        over: Rows that take no further token.
        content: Tokens of the response, end ids left out; -1: still open.
        has_end: Whether an end id stands behind them.
        looked: Unseen tokens so far.
        is_own: Whether the model itself has ended the row.
        turn: Index into `_TURNS`.
    """

    latched: Tensor
    active: Tensor
    closing: Tensor
    over: Tensor
    content: Tensor
    has_end: Tensor
    looked: Tensor
    is_own: Tensor
    turn: Tensor

    @classmethod
    def fresh(cls, batch: int, device: torch.device) -> _State:
        no = torch.zeros(batch, dtype=torch.bool, device=device)
        none = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(no, ~no, no, no, none - 1, no, none, no, none)


class RowStatus:
    """The rows of one session, as its loop goes on.

    Args:
        session: Parks rows.
        room: New tokens for which each row has positions; None: no limit.

    Attributes:
        pads_after_end: Whether a row that has ended goes on with pads.
        bare_end: Tokens after which bare `generate` ends; None: it goes on.
    """

    def __init__(self, session: Session, room: Sequence[int] | None = None) -> None:
        self._session, self._room = session, room
        self.pads_after_end = False
        self.bare_end: int | None = None
        self._state = _State.fresh(0, torch.device("cpu"))
        self._ends = self._own_ends = torch.empty(0, dtype=torch.int64)
        self._wanted = self._limit = torch.empty(0, dtype=torch.int64)
        self._is_even = True
        self._is_unsorted = False  # a row was parked, or all failed, since `go_on`
        self._any_ahead = False  # a row is read on behind its response

    def begin(
        self, input_ids: Tensor, ends: EndIds, *, pads_after_end: bool, room: int | None = None
    ) -> None:
        """Get ready for a prompt [batch, seq].

        Args:
            input_ids: The prompt.
            ends: Ids that end a row.
            pads_after_end: Whether a row that has ended goes on with pads.
            room: New tokens for which a cache of fixed size has places; None: no limit.

        Raises:
            BeatError: It has another batch than the session.
        """
        session, device = self._session, input_ids.device
        if input_ids.shape[0] != session.batch:
            raise BeatError(
                f"generate runs {input_ids.shape[0]} rows, the session {session.batch}; "
                "open it for the expanded batch."
            )
        self.pads_after_end = pads_after_end
        self._state = _State.fresh(session.batch, device)
        self._ends = torch.tensor(ends.all, dtype=torch.int64, device=device)
        self._own_ends = torch.tensor(ends.own, dtype=torch.int64, device=device)
        limits = [2**40] * session.batch if self._room is None else self._room
        limits = [n if room is None else min(n, room) for n in limits]
        wanted = [own.unseen_tokens for own in session.roster.policies]
        self._limit = torch.tensor(limits, device=device)
        self._wanted = torch.tensor(wanted, device=device)

    @property
    def parked(self) -> Tensor | None:
        """[batch] bool, rows that have tripped or failed; None: no row."""
        return self._session.parked

    @property
    def active(self) -> Tensor | None:
        """[batch] bool, rows whose newest token the next forward judges; None: every row."""
        return None if self._is_even else self._state.active

    @property
    def closes(self) -> bool:
        """Say whether a row whose guard fails is closed."""
        return self._session.roster.closes

    @property
    def are_even(self) -> bool:
        """Say whether no row has been parked or has ended."""
        return self.parked is None and self._is_even

    @property
    def wanted(self) -> list[int]:
        """[batch] unseen tokens that are to be judged behind a response that others end."""
        wanted: list[int] = self._wanted.tolist()
        return wanted

    def go_on_as_they_are(self, flags: Tensor) -> bool:
        """Say that `go_on` would change nothing: most steps, whoever has ended. Waits.

        Args:
            flags: [batch] bool, rows that end, trip or are broken, old news among them.
        """
        if self._is_unsorted or self._any_ahead:
            return False
        return not bool(self.counted(flags).any())

    def counted(self, flags: Tensor) -> Tensor:
        """Leave of `flags` [batch] bool the rows that still count."""
        return flags if self._is_even else flags & self._state.active

    def and_parked(self, flags: Tensor) -> Tensor:
        """Add the parked rows to `flags` [batch] bool."""
        return flags if self.parked is None else flags | self.parked

    def park(self, row: int, *, said: int, error: GuardError | None = None) -> None:
        """Park a row that tripped, or failed by `error`, behind `said` tokens."""
        self._session.park(row, said=said, error=error)
        self._is_unsorted = True

    def fail(self, error: GuardError, *, said: int) -> None:
        """Close every row that still counts; or note the error, if going on was allowed."""
        session = self._session
        counts = [True] * session.batch if self._is_even else self._state.active.tolist()
        for row in (row for row, does_count in enumerate(counts) if does_count):
            if self.closes and session.roster.policies[row].protects:
                session.park(row, said=said, error=error)
            session.errors.setdefault(row, error)
        self._is_unsorted = True
        # Where errors are allowed, nobody judges any more what would be looked at.
        self._wanted = torch.zeros_like(self._wanted)

    def go_on(self, newest: Tensor, done: Tensor, n_said: int, trusted: Tensor | None) -> Turns:
        """Decide which rows the next forward judges.

        Args:
            newest: [batch] ids that were chosen last.
            done: [batch] bool, rows that bare `generate` ends with these.
            n_said: Tokens chosen so far.
            trusted: [batch] bool, rows in which an end id is the model's own choice; None: all.

        Returns:
            What the choice is to each row.
        """
        self._is_unsorted = self._is_even = False
        self._state = state = self._after(newest, done, n_said, trusted)
        self._any_ahead = bool((state.active & (state.content >= 0)).any())
        if self.bare_end is None and bool(state.latched.all()):
            self.bare_end = n_said
        for row in (state.content >= 0).nonzero()[:, 0].tolist():
            self._session.close(row, int(state.content[row]))
        turns = [_TURNS[index] for index in state.turn.tolist()]
        return Turns(turns, state.over.tolist(), self.wanted)

    def over(self, newest: Tensor, done: Tensor, n_said: int, trusted: Tensor | None) -> Tensor:
        """Tell, without a wait, which rows [batch] take no further token; see `go_on`."""
        return self.and_parked(self._after(newest, done, n_said, trusted).over)

    def is_over(self, done: Tensor) -> Tensor:
        """Return the rows [batch] bool that take no further token, after `go_on` or without."""
        return self.and_parked(done if self._is_even else self._state.over)

    def _after(self, newest: Tensor, done: Tensor, n_said: int, trusted: Tensor | None) -> _State:
        """Compute the state after one choice; waits for nothing."""
        old, wanted = self._state, self._wanted
        active = old.active & ~old.closing
        if self.parked is not None:
            active = active & ~self.parked
        latched = self.and_parked(old.latched | done)
        # Without pads no row ends before its batch does.
        ends = done if self.pads_after_end else latched.all().expand_as(done)
        looking = active & (old.content >= 0)
        ending = active & ~looking & ends
        is_end = torch.isin(newest, self._ends) & (ending | looking)
        is_models = torch.isin(newest, self._own_ends)
        is_own = is_models if trusted is None else is_models & trusted
        own = is_end & (is_own | (wanted == 0))
        lost = is_end & is_models & ~own
        content = torch.where(ending, n_said - is_end.long(), old.content)
        # An end id that is none of the model's own is read on over like any token.
        looked = old.looked + ((looking | (ending & is_end)) & ~own & ~lost).long()
        goes_on = (looking | ending) & ~own & ~lost
        closing = goes_on & (looked >= torch.minimum(wanted, self._limit - content))
        active = active & ~own & ~lost
        turn = torch.where(ending, 1, 0)
        turn = torch.where(looking | (ending & is_end), 2, turn)
        turn = torch.where(own, 3, torch.where(lost, 4, turn))
        return _State(
            latched=latched,
            active=active,
            closing=closing,
            over=~active | closing,
            content=content,
            has_end=old.has_end | (ending & is_end),
            looked=looked,
            is_own=old.is_own | own,
            turn=turn,
        )

    def reopen(self) -> None:
        """Count every row again, to close them all."""
        self._is_even = True

    def said(self, n_said: int) -> list[int]:
        """Count the tokens of each row that have to be judged; waits for the device."""
        state = self._state
        content = torch.where(state.content < 0, n_said, state.content)
        counts: list[int] = (content + state.looked).tolist()
        return counts

    def ends(self, n_said: int) -> list[RowEnd]:
        """Say how each row has ended; waits for the device."""
        state, found = self._state, []
        columns = (state.content, state.looked, state.is_own, state.has_end, self._wanted)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for row, (content, looked, is_own, has_end, wanted) in enumerate(rows):
            if row in self._session.trips:
                n_ids = content if content >= 0 else n_said
                found.append(RowEnd(n_ids, n_ids, looked, 0))
                continue
            withheld = 0 if is_own else min(content, max(0, wanted - looked))
            n_ids = content - withheld + (has_end and not withheld)
            found.append(RowEnd(n_ids, content, looked, withheld))
        return found
