"""Every choice of a batch as the guard sees it: judged before it is drawn, sorted after.

Knows scores, chosen ids, which rows still count, and what closes a row. Does not know how the loop
around it runs, text, redirects or traces. Each token has exactly one score; whatever fails in the
guard closes the rows that still count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from safe_decode.engines.transformers.loops.device_checks import (
    AsyncFlag,
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
from safe_decode.policy.redirect import forced_scores
from safe_decode.policy.self_check import SelfChecker
from safe_decode.session.row_rng import GlobalDraws, RowRNG
from safe_decode.session.session import Session
from safe_decode.session.turns import Turns

__all__ = ["ChoiceJudge"]


class _Unsorted(NamedTuple):
    """One choice, as `on_done` has seen it.

    Attributes:
        input_ids: [batch, seq].
        done: [batch] bool, rows that bare `generate` ends.
        trips: [batch] bool, rows that trip or are broken; None: none can.
        own_ends: [batch] bool, rows in which an end is the model's own choice; None: all.
    """

    input_ids: Tensor
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
        self._late: AsyncFlag | None = None  # where asking would wait
        self._unsorted: _Unsorted | None = None

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
        if self._unsorted is not None:
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
        flags = done if trips is None else done | trips
        if self._late is not None:
            self._late.send(flags)
            self._unsorted = _Unsorted(input_ids, done, trips, self._own_ends)
            over = self._rows.over(input_ids[:, -1], done, self._said, self._own_ends)
            return over if trips is None else over | trips
        # The step's one wait for the host, just before the loop's own.
        turns = None
        if not self._rows.go_on_as_they_are(flags):
            turns = self._sort_rows(_Unsorted(input_ids, done, trips, self._own_ends))
        self._tell(input_ids, turns)
        return self._rows.is_over(done)

    def _tell(self, input_ids: Tensor, turns: Turns | None) -> None:
        if self._follower is not None:
            self._follower.on_choice(input_ids[:, -1].tolist(), turns, self.session.trips)

    def _sort_late(self) -> None:
        """Do what `on_done` left, before the next forward is judged: nothing came between."""
        if self._unsorted is None or self._late is None:
            return
        unsorted, self._unsorted = self._unsorted, None
        if not self._rows.are_even or self._late.read():
            self._sort_rows(unsorted)

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
        if tops.is_cpu and none_parked and all_finite(tops):
            return scores
        is_broken = broken(tops)
        if none_parked and not bool(is_broken.any()):
            return scores
        forced = self._rows.and_parked(is_broken)
        self._park_nonfinite(self._rows.counted(is_broken).nonzero()[:, 0].tolist())
        return forced_scores(scores, dict.fromkeys(forced.nonzero()[:, 0].tolist(), self._pad_id))

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
        if not self._do_sample and self._scores is not None and self._rows.closes:
            is_broken = broken(picked(self._scores, input_ids))
            trips = is_broken if trips is None else trips | is_broken
        if trips is not None and self.session.roster.protected is not None:
            trips = trips & self.session.roster.protected
        return None if trips is None else self._rows.counted(trips)

    def _sort_rows(self, step: _Unsorted) -> Turns:
        """Park what tripped and see who goes on. Not on the path while all rows go on."""
        input_ids, done, trips, own_ends = step
        if trips is not None:
            judged = [] if self._trips is None else self._trips.tolist()
            for row in trips.nonzero()[:, 0].tolist():
                if judged and judged[row]:
                    # The newest token is chosen, not judged: a look does not see it.
                    if not self._is_cleared(row, input_ids[:, :-1]):
                        self._rows.park(row, said=self._n_judged)
                else:
                    self._park_nonfinite([row])
        had_ended = self.has_bare_ended
        turns = self._rows.go_on(input_ids[:, -1], done, self._said, own_ends)
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
