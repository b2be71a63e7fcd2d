"""Every choice of a batch as the guard sees it: judged before it is drawn, sorted after.

Knows scores, chosen ids, which rows still count, and what closes a row. Does not know how the loop
around it runs, text, redirects or traces. Each token has exactly one score; whatever fails in the
guard closes the rows that still count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safe_decode.engines.transformers.loops.device_checks import (
    all_finite,
    broken,
    picked,
    top,
)
from safe_decode.engines.transformers.loops.extra_forwards import OwnForwards
from safe_decode.engines.transformers.loops.row_status import RowStatus
from safe_decode.engines.transformers.loops.settings import (
    Follower,
)
from safe_decode.errors import BeatError, GuardError, NonFiniteError
from safe_decode.host_copies import LateCopies
from safe_decode.policy.redirect import forced_scores
from safe_decode.policy.self_check import SelfChecker
from safe_decode.session.row_rng import GlobalDraws, RowRNG
from safe_decode.session.session import Session
from safe_decode.session.turns import Turns

__all__ = ["ChoiceJudge"]


class _Choice(NamedTuple):
    """One choice of every row, on the host but for `input_ids`.

    Attributes:
        input_ids: [batch, seq], where they are.
        newest: [batch] its last column.
        done: [batch] bool, rows that bare `generate` ends.
        trips: [batch] bool, rows that trip or are broken; None: none can.
        own_ends: [batch] bool, rows in which an end is the model's own choice; None: all.
    """

    input_ids: Tensor
    newest: Tensor
    done: Tensor
    trips: Tensor | None
    own_ends: Tensor | None


class ChoiceJudge:
    """Judges the choices of one call.

    Args:
        session: For the rows of this call, already expanded by num_return_sequences.
        draws: Draws each row's tokens instead of the global generator.
        follower: Hears of each choice.
        checker: Looks again at rows that alarm, and may clear them.
        room: New tokens for which each row has positions in the model's context; None: no limit.
    """

    def __init__(
        self,
        session: Session,
        *,
        draws: RowRNG | None = None,
        follower: Follower | None = None,
        checker: SelfChecker | None = None,
        room: Sequence[int] | None = None,
    ) -> None:
        self.session = session
        self._checker = checker
        if checker is not None:
            session.looks = checker.looks
        self._own: OwnForwards | None = None
        self._draws, self._follower = draws, follower
        self._said = 0
        self._scored = 0
        self._pad_id = 0
        self._do_sample = False
        self._is_blind = False
        self._rows = RowStatus(session, room)
        self._own_ends: Tensor | None = None  # rows in which an end would be the model's choice
        self._global_draws: GlobalDraws | None = None
        self._scores: Tensor | None = None
        self._trips: Tensor | None = None
        self._late: LateCopies | None = None  # where asking would wait
        self._unsorted: Tensor | None = None  # ids of the choice that is on its way to the host
        self._undrawable: Tensor | None = None  # rows whose scores cannot be drawn from, there
        self._pad_scores: Tensor | None = None

    @property
    def pads_after_end(self) -> bool:
        """Say whether a row that has ended goes on with pads."""
        return self._rows.pads_after_end

    @property
    def has_bare_ended(self) -> bool:
        """Say whether bare `generate` would have ended by now."""
        return self._rows.bare_end is not None

    def on_scores(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Judge the forward that made `scores` [batch, vocab]; comes last of all processors."""
        self._sort_late()
        self._scored += 1
        if not self._is_blind:
            positions = (1, input_ids.shape[1]) if self._said else self._prefilled(input_ids)
            self._judge(positions, input_ids)
        if self._do_sample and self._rows.closes:
            scores = self._drawable(scores)
        self._scores = scores
        return scores if self._draws is None or not self._do_sample else self._draws.forced(scores)

    def on_done(self, input_ids: Tensor, done: Tensor) -> Tensor:
        """Take note of the chosen ids; add parked rows to those that are `done` [batch]."""
        self._said += 1
        if self._scored != self._said and not self._is_blind:
            self._fail(
                BeatError(
                    f"{self._said} tokens were chosen and the guard's processor saw "
                    f"{self._scored}; do not remove it while generating."
                ),
            )
        trips = self._suspects(input_ids)
        choice = _Choice(input_ids, input_ids[:, -1], done, trips, self._own_ends)
        if self._late is not None:
            return self._send(self._late, choice)
        self._sort(choice)
        return self._rows.is_over(done)

    def _send(self, late: LateCopies, choice: _Choice) -> Tensor:
        """Send a choice to the host; say meanwhile which rows take no further token."""
        _, newest, done, trips, own_ends = choice
        named = {"newest": newest, "done": done, "trips": trips, "own_ends": own_ends}
        late.send({name: value for name, value in named.items() if value is not None})
        self._unsorted = choice.input_ids
        # A look may clear a row, so that one that alarms is not over yet.
        if trips is None or self._checker is not None:
            return self._rows.over(newest, done, self._said)
        return self._rows.over(newest, done | trips, self._said) | trips

    def _sort_late(self) -> None:
        """Do what `on_done` left, before the next forward is judged: nothing came between."""
        if self._unsorted is None or self._late is None:
            return
        input_ids, self._unsorted = self._unsorted, None
        here = self._late.read()
        self._sort(
            _Choice(
                input_ids, here["newest"], here["done"], here.get("trips"), here.get("own_ends")
            )
        )

    def _sort(self, choice: _Choice) -> None:
        """See which rows go on, and tell who follows."""
        done, trips = choice.done, choice.trips
        turns = None
        if not self._rows.go_on_as_they_are(done if trips is None else done | trips):
            turns = self._sort_rows(choice)
        self._tell(choice.newest, turns)

    def _tell(self, newest: Tensor, turns: Turns | None) -> None:
        if self._follower is not None:
            self._follower.on_choice(newest.tolist(), turns, self.session.trips)

    def _prefilled(self, input_ids: Tensor) -> tuple[int, ...]:
        assert self._own is not None
        if not self._own.hides(max(self.session.roster.scanned)):
            return (self._own.positions,)
        self.session.reader.discard()
        self._does(self._own.read_whole, input_ids)
        return (input_ids.shape[1],)

    def _does(self, read: Callable[[Tensor], None], sequences: Tensor) -> bool:
        try:
            read(sequences)
        except Exception as error:  # whatever fails in the guard closes its rows
            from safe_decode.errors import as_guard_error

            self._fail(as_guard_error(error))
            return False
        return True

    def _judge(self, positions: tuple[int, ...], ids: Tensor) -> None:
        try:
            self.session.note(ids)
            self._trips = self.session.judge(positions, self._rows.active)
        except Exception as error:  # whatever fails in the guard closes its rows
            from safe_decode.errors import as_guard_error

            self._fail(as_guard_error(error))

    def _fail(self, error: GuardError) -> None:
        self._is_blind, self._trips = True, None
        self._rows.fail(error, said=self._n_judged)

    @property
    def _n_judged(self) -> int:
        """Count a row's tokens that a score has judged."""
        return max(0, self._scored - 1)

    def _drawable(self, scores: Tensor) -> Tensor:
        """Keep a draw from failing for the whole batch where one row's scores are not finite."""
        tops, none_parked = top(scores), self._rows.parked is None
        if self._late is not None:
            self._undrawable = broken(tops)
            return self._padded(scores, self._rows.and_parked(self._undrawable))
        if none_parked and all_finite(tops):
            return scores
        is_broken = broken(tops)
        if none_parked and not bool(is_broken.any()):
            return scores
        forced = self._rows.and_parked(is_broken)
        self._park_nonfinite(self._rows.counted(is_broken).nonzero()[:, 0].tolist())
        return forced_scores(scores, dict.fromkeys(forced.nonzero()[:, 0].tolist(), self._pad_id))

    def _padded(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Let the rows [batch] bool say a pad, whatever their scores [batch, vocab] hold."""
        if self._pad_scores is None:
            self._pad_scores = torch.full_like(scores[0], -torch.inf)
            self._pad_scores[self._pad_id] = 0.0
        return torch.where(rows[:, None], self._pad_scores, scores)

    def _park_nonfinite(self, rows: list[int]) -> None:
        for row in rows:
            error = NonFiniteError(
                f"row {row} has NaN or Inf in its scores before token {self._scored - 1}, wanted "
                "finite scores; check the model's weights and dtype."
            )
            self._rows.park(row, said=self._n_judged, error=error)

    def _suspects(self, input_ids: Tensor) -> Tensor | None:
        if not self.session.roster.protects:
            return None
        trips = None if self._is_blind else self._trips
        is_broken = self._undrawable
        if not self._do_sample and self._scores is not None and self._rows.closes:
            is_broken = broken(picked(self._scores, input_ids))
        if is_broken is not None:
            trips = is_broken if trips is None else trips | is_broken
        if trips is not None and self.session.roster.protected is not None:
            trips = trips & self.session.roster.protected
        return None if trips is None else self._rows.counted(trips)

    def _sort_rows(self, choice: _Choice) -> Turns:
        """Park what tripped and see who goes on. Not on the path while all rows go on."""
        trips = choice.trips
        tripped = [] if trips is None else trips.nonzero()[:, 0].tolist()
        if tripped:  # only now is the device asked
            judged = [] if self._trips is None else self._trips.tolist()
            lost = [] if self._undrawable is None else self._undrawable.tolist()
        for row in tripped:
            if judged and judged[row] and not (lost and lost[row]):
                # The newest token is chosen, not judged: a look does not see it.
                if not self._is_cleared(row, choice.input_ids[:, :-1]):
                    self._rows.park(row, said=self._n_judged)
            else:
                self._park_nonfinite([row])
        had_ended = self.has_bare_ended
        turns = self._rows.go_on(choice.newest, choice.done, self._said, choice.own_ends)
        if self.has_bare_ended and not had_ended and not all(turns.is_last):
            self._begin_ahead()
        return turns

    def _begin_ahead(self) -> None:
        """What is chosen from here on nobody sees."""
        assert self._own is not None
        self._own.look_ahead()
        if self._global_draws is not None:
            self._global_draws.mark()

    def _is_cleared(self, row: int, judged_ids: Tensor) -> bool:
        if self._checker is None or not bool(self.session.state.finite[row]):
            return False
        score = self.session.judged(row) + self.session.roster.scanned[row] - 1
        return self._checker.clears(row, judged_ids[row].tolist(), score)
