"""Which rows of a running loop still count, where the others have ended, and by whom.

Knows rows that are parked, that look ahead, that close and that have ended. Does not know
scores, forwards or models. All of it is kept on the host, which hears of each choice there; the
rows' device is told which rows count, and asked by `over` alone, before the host has heard.

A row that the model itself ends is over. A row that somebody else ends (a cap, a stop string, a
clock, a criterion) goes on unseen for k tokens, its hold-back, so that its last words are judged
as in the middle of a longer answer; then its last token is judged once more, and it is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from safe_decode.engines.transformers.loops.row_state import TURNS, EndIds, EndRules, RowState
from safe_decode.errors import BeatError, GuardError
from safe_decode.host_copies import sent
from safe_decode.session.session import Session
from safe_decode.session.turns import RowEnd, Turns

__all__ = ["RowStatus"]


class RowStatus:
    """The rows of one session, as its loop goes on.

    Args:
        session: Parks rows.
        room: New tokens for which each row has positions; None: no limit.

    Attributes:
        bare_end: Tokens after which bare `generate` ends; None: it goes on.
    """

    def __init__(self, session: Session, room: Sequence[int] | None = None) -> None:
        self._session, self._room = session, room
        self.bare_end: int | None = None
        self._state = RowState.fresh(0)
        self._device = torch.device("cpu")
        self._there: dict[str, Tensor] = {}  # masks of the state that the device was told
        none = torch.empty(0, dtype=torch.int64)
        self._rules = EndRules(none, none, none, none, pads_after_end=False)
        self._ends_there = self._own_ends_there = none
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
        session, self._device = self._session, input_ids.device
        if input_ids.shape[0] != session.batch:
            raise BeatError(
                f"generate runs {input_ids.shape[0]} rows, the session {session.batch}; "
                "open it for the expanded batch."
            )
        self._state = RowState.fresh(session.batch)
        limits = [2**40] * session.batch if self._room is None else self._room
        limits = [n if room is None else min(n, room) for n in limits]
        wanted = [own.unseen_tokens for own in session.roster.policies]
        self._rules = EndRules(
            torch.tensor(ends.all, dtype=torch.int64),
            torch.tensor(ends.own, dtype=torch.int64),
            torch.tensor(wanted),
            torch.tensor(limits),
            pads_after_end=pads_after_end,
        )
        self._ends_there = sent(self._rules.ends, self._device)
        self._own_ends_there = sent(self._rules.own_ends, self._device)

    @property
    def pads_after_end(self) -> bool:
        """Say whether a row that has ended goes on with pads."""
        return self._rules.pads_after_end

    @property
    def parked(self) -> Tensor | None:
        """[batch] bool, rows that have tripped or failed; None: no row."""
        return self._session.parked

    @property
    def active(self) -> Tensor | None:
        """[batch] bool there, rows whose newest token the next forward judges; None: every one."""
        return None if self._is_even else self._told("active", self._state.active)

    @property
    def any_active(self) -> bool:
        """Say whether the next forward judges any row."""
        return self._is_even or bool(self._state.active.any())

    @property
    def closes(self) -> bool:
        """Say whether a row whose guard fails is closed."""
        return self._session.roster.closes

    @property
    def wanted(self) -> list[int]:
        """[batch] unseen tokens that are to be judged behind a response that others end."""
        wanted: list[int] = self._rules.wanted.tolist()
        return wanted

    def go_on_as_they_are(self, flags: Tensor) -> bool:
        """Say that `go_on` would change nothing: most steps, whoever has ended.

        Args:
            flags: [batch] bool, rows that end, trip or are broken, old news among them.
        """
        if self._is_unsorted or self._any_ahead:
            return False
        return not bool((flags if self._is_even else flags & self._state.active).any())

    def counted(self, flags: Tensor) -> Tensor:
        """Leave of `flags` [batch] bool there the rows that still count."""
        active = self.active
        return flags if active is None else flags & active

    def and_parked(self, flags: Tensor) -> Tensor:
        """Add the parked rows to `flags` [batch] bool there."""
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
        self._rules = replace(self._rules, wanted=torch.zeros_like(self._rules.wanted))

    def go_on(self, newest: Tensor, done: Tensor, n_said: int, trusted: Tensor | None) -> Turns:
        """Decide which rows the next forward judges.

        Args:
            newest: [batch] ids that were chosen last, on the host as the others.
            done: [batch] bool, rows that bare `generate` ends with these.
            n_said: Tokens chosen so far.
            trusted: [batch] bool, rows in which an end id is the model's own choice; None: all.

        Returns:
            What the choice is to each row.
        """
        self._is_unsorted = self._is_even = False
        self._there = {}
        self._state = state = self._state.after(
            newest, done, n_said, trusted, self._rules, self._session.trips
        )
        self._any_ahead = bool((state.active & (state.content >= 0)).any())
        if self.bare_end is None and bool(state.latched.all()):
            self.bare_end = n_said
        for row in (state.content >= 0).nonzero()[:, 0].tolist():
            self._session.close(row, int(state.content[row]))
        turns = [TURNS[index] for index in state.turn.tolist()]
        return Turns(turns, state.over.tolist(), self.wanted)

    def over(self, newest: Tensor, done: Tensor, n_said: int) -> Tensor:
        """Tell, before the host hears of a choice, which rows take no further token.

        Args:
            newest: [batch] ids that were chosen last, on the rows' device as the others.
            done: [batch] bool, rows that bare `generate` ends with these, or that trip.
            n_said: Tokens chosen so far.

        Returns:
            [batch] bool there, unread: `over` of the state that `go_on` makes of the same.
        """
        ends = done
        if not self.pads_after_end:
            latched = done if self._is_even else done | self._told("latched", self._state.latched)
            ends = self.and_parked(latched).all().expand_as(done)
        least, most = self._rules.reach(n_said)
        if self._any_ahead or self._is_unsorted or (least <= 1 and most > 0):
            return self.and_parked(self._over_one_by_one(newest, ends, n_said))
        # All that end are over, or none but those that end by themselves.
        over = ends if most <= 0 else ends & torch.isin(newest, self._own_ends_there)
        if not self._is_even:
            over = over | ~self._told("active", self._state.active)
        return self.and_parked(over)

    def _over_one_by_one(self, newest: Tensor, ends: Tensor, n_said: int) -> Tensor:
        """As `over`, where rows are read on or differ; what the host knows is sent as masks."""
        state, wanted, limit = self._state, self._rules.wanted, self._rules.limit
        active = state.active & ~state.closing
        looks = active & (state.content >= 0)
        closes = state.looked + 1 >= torch.minimum(wanted, limit - state.content)
        if_end = torch.minimum(wanted, limit - n_said + 1) <= 1
        if_not = torch.minimum(wanted, limit - n_said) <= 0
        masks = torch.stack([active, looks, looks & closes, if_end | (wanted == 0), if_not])
        active, looks, closes, if_end, if_not = sent(masks, self._device).unbind()
        is_end = torch.isin(newest, self._ends_there)
        is_models = torch.isin(newest, self._own_ends_there)
        begins = ends & torch.where(is_end, is_models | if_end, if_not)
        return ~active | closes | torch.where(looks, is_models, begins)

    def _told(self, name: str, mask: Tensor) -> Tensor:
        """Return a mask of the state there, sent once for each state."""
        if name not in self._there:
            self._there[name] = sent(mask, self._device)
        return self._there[name]

    def is_over(self, done: Tensor) -> Tensor:
        """Return the rows [batch] bool that take no further token, after `go_on` or without.

        On the host, as `done` is.
        """
        return self.and_parked(done if self._is_even else self._state.over)

    def reopen(self) -> None:
        """Count every row again, to close them all."""
        self._is_even = True

    def said(self, n_said: int) -> list[int]:
        """Count the tokens of each row that have to be judged."""
        state = self._state
        content = torch.where(state.content < 0, n_said, state.content)
        counts: list[int] = (content + state.looked).tolist()
        return counts

    def ends(self, n_said: int) -> list[RowEnd]:
        """Say how each row has ended."""
        state, found = self._state, []
        columns = (state.content, state.looked, state.is_own, state.has_end, self._rules.wanted)
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
