"""Our `custom_generate`: the bare loop of transformers, watched, with a closing forward.

Knows the arguments that `generate` hands to a decoding method, which rows still count, and
what is decoded unseen behind rows that the model does not end itself. Does not know text,
redirects or traces.

The loop itself is `GenerationMixin._sample`, not a copy of it, so that a row that does not
trip is what bare `generate` makes it, draw for draw. A tripped row is *parked*: its monitor
is frozen and our criterion ends it, while its place in the batch, and so the draws of its
neighbours, stay as they were. A row that somebody else ends goes on unseen for as many tokens as
it holds back; the global generator is then taken back to where bare `generate` leaves it.
Decoder-only models, one forward a token, eager execution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_decode.engines.transformers.loops.device_checks import (
    AsyncFlag,
    all_finite,
    broken,
    chosen,
    picked,
    top,
)
from safe_decode.engines.transformers.loops.extra_forwards import OwnForwards
from safe_decode.engines.transformers.loops.row_status import EndIds, RowStatus
from safe_decode.engines.transformers.loops.settings import (
    CallSettings,
    CriteriaList,
    Follower,
    PreparedSettings,
    ProcessorList,
    WatchedCriteria,
    WatchedProcessors,
    chooses_end,
    models_ends,
    reweighs,
    settings_of,
)
from safe_decode.errors import BeatError, GuardError, NonFiniteError
from safe_decode.policy.redirect import forced_scores
from safe_decode.policy.self_check import SelfChecker
from safe_decode.session.row_rng import GlobalDraws, RowRNG
from safe_decode.session.session import Session
from safe_decode.session.turns import RowEnd, Turns
from safe_decode.typing import CausalLM

__all__ = ["StepLoop"]


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


class StepLoop:
    """A decoding method for `model.generate(custom_generate=...)`; good for one call.

    Args:
        session: For the rows of this call, already expanded by num_return_sequences.
        require: Called with the settings before the first forward; may raise.
        draws: Draws each row's tokens instead of the global generator.
        follower: Is told of each choice.
        checker: Looks again at rows that alarm, and may clear them.
        room: New tokens for which each row has positions in the model's context; None: no limit.
        reweighed: [batch] whether a request reweighs the row's scores; None: all rows, if one of
            the processors does.

    Attributes:
        ends: How each row has ended; filled when the call has.
    """

    def __init__(
        self,
        session: Session,
        *,
        require: Callable[[CallSettings], None] | None = None,
        draws: RowRNG | None = None,
        follower: Follower | None = None,
        checker: SelfChecker | None = None,
        room: Sequence[int] | None = None,
        reweighed: Sequence[bool] | None = None,
    ) -> None:
        self.session = session
        self._checker = checker
        if checker is not None:
            session.looks = checker.looks
        self.settings: CallSettings | None = None
        self._require = require
        self.ends: list[RowEnd] = []
        self.generation: Any = None
        self._own: OwnForwards | None = None
        self._draws, self._follower = draws, follower
        self._said = 0
        self._scored = 0
        self._prompt_tokens = 0
        self._pad_id = 0
        self._do_sample = False
        self._is_blind = False
        self._rows = RowStatus(session, room)
        self._reweighed = reweighed
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

    def ahead(self, row: int, n: int) -> tuple[int, ...]:
        """Return the first `n` unseen ids behind a row's response."""
        if not n or self.generation is None:
            return ()
        sequences: Tensor = getattr(self.generation, "sequences", self.generation)
        first = self._prompt_tokens + self.ends[row].content
        return tuple(sequences[row, first : first + n].tolist())

    @property
    def bare_steps(self) -> int | None:
        """Count the tokens after which bare `generate` ends; None: it was left before."""
        return self._rows.bare_end

    def __call__(
        self,
        model: CausalLM,
        input_ids: Tensor,
        logits_processor: ProcessorList,
        stopping_criteria: CriteriaList,
        generation_config: PreparedSettings,
        **model_kwargs: Any,  # noqa: ANN401 - what the forward takes
    ) -> object:
        """Generate.

        Returns:
            What bare `generate` returns: ids [batch, seq], or its output object; what a
            parked row holds after its trip is not to be read.

        Raises:
            Exception: What the model, or a processor of the user's, raises.
        """
        from safe_decode.engines.transformers.loops.processor import SafetyLogitsProcessor

        self._own = OwnForwards(model, input_ids, generation_config, model_kwargs)
        self._prepare(input_ids, generation_config)
        self._begin(model, input_ids, stopping_criteria)
        processors = WatchedProcessors(
            logits_processor,
            SafetyLogitsProcessor(self),
            on_bare=self._end_watch(input_ids, logits_processor),
        )
        try:
            kind: Any = type(model)
            self.generation = kind._sample(
                model,
                input_ids,
                logits_processor=processors,
                stopping_criteria=WatchedCriteria(stopping_criteria, self),
                generation_config=generation_config,
                **model_kwargs,
            )
            sequences: Tensor = getattr(self.generation, "sequences", self.generation)
            self._close(sequences)
        finally:
            self._take_back()
        self._settle(sequences)
        if self._follower is not None:
            self._follower.on_end(self._rows.wanted, self.session.trips)
        return self.generation

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
        if self._is_calm(input_ids, done):
            self._tell(input_ids, None)
            return self._rows.is_over(done)
        trips = self._suspects(input_ids)
        flags = done if trips is None else done | trips
        if self._late is not None:
            self._late.send(flags)
            self._unsorted = _Unsorted(input_ids, done, trips, self._own_ends)
            over = self._rows.over(input_ids[:, -1], done, self._said, self._own_ends)
            return over if trips is None else over | trips
        # The step's one wait for the host, just before the loop's own.
        turns = None
        if not self._rows.are_even or bool(flags.any()):
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

    def _prepare(self, input_ids: Tensor, config: PreparedSettings) -> None:
        self.settings = settings = settings_of(config, input_ids.shape[1])
        if self._require is not None:
            self._require(settings)
        self._prompt_tokens = input_ids.shape[1]
        self._do_sample = settings.do_sample
        self._pad_id = settings.pad_id or 0
        if input_ids.is_cuda and self._follower is None and self._checker is None:
            # Who follows is told of each token, and a check asks at once: the host waits anyway.
            self._late = AsyncFlag(input_ids.device)
        if self._draws is not None:
            # Processors are built by now, the warpers of sampling included; the draw is ours.
            config.do_sample = False
        elif settings.do_sample:
            self._global_draws = GlobalDraws(input_ids.device)

    def _begin(self, model: CausalLM, input_ids: Tensor, criteria: CriteriaList) -> None:
        assert self.settings is not None and self._own is not None
        ends, models = self.settings.end_ids, models_ends(model)
        self._rows.begin(
            input_ids,
            EndIds(ends, tuple(i for i in ends if i in models) if models else ends),
            pads_after_end=any(hasattr(criterion, "eos_token_id") for criterion in criteria),
            room=self._own.room,
        )

    def _end_watch(
        self,
        input_ids: Tensor,
        processors: ProcessorList,
    ) -> Callable[[Tensor], None] | None:
        """Return what watches whether an end would be the model's own choice; None: it is."""
        assert self.settings is not None
        rows = self._reweighed
        if rows is None:
            rows = [reweighs(processors)] * self.session.batch
        if not self.settings.end_ids or not any(rows):
            return None
        ends = self.settings.end_ids
        spared = torch.tensor([not row for row in rows], device=input_ids.device)

        def watch(scores: Tensor) -> None:
            self._own_ends = chooses_end(scores, ends) | spared

        return watch

    def _take_back(self) -> None:
        """Leave the generator and a cache that outlives the call as bare `generate` does."""
        if self._global_draws is not None:
            self._global_draws.restore()
        if self._rows.bare_end is not None and self._own is not None:
            self._own.forget_ahead(self._rows.bare_end)

    def _prefilled(self, input_ids: Tensor) -> tuple[int, ...]:
        assert self._own is not None
        if not self._own.hides(max(self.session.scanned)):
            return (self._own.positions,)
        self.session.discard()
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

    def _is_calm(self, input_ids: Tensor, done: Tensor) -> bool:
        """Say, on the CPU, that no row that counts ends, trips or is broken: most steps."""
        if self._is_blind or not done.is_cpu:
            return False
        rows, ends = self._rows, done.tolist()
        if not self.session.protects:
            return rows.go_on_as_they_are(ends)
        if self.session.is_quiet:
            is_calm = rows.go_on_as_they_are(ends)
        else:
            is_calm = rows.go_on_as_they_are(ends, self._protected_trips())
        if not is_calm or self._do_sample or self._scores is None or not rows.closes:
            return is_calm
        values = chosen(self._scores, input_ids)
        # The score of a pad tells nothing.
        return all_finite(values) or (rows.active is not None and all_finite(values[rows.active]))

    def _protected_trips(self) -> list[bool]:
        trips, protected = self._trips, self.session.protected
        if trips is None:
            return []
        return (trips if protected is None else trips & protected).tolist()

    def _suspects(self, input_ids: Tensor) -> Tensor | None:
        if not self.session.protects:
            return None
        trips = None if self._is_blind else self._trips
        if not self._do_sample and self._scores is not None and self._rows.closes:
            is_broken = broken(picked(self._scores, input_ids))
            trips = is_broken if trips is None else trips | is_broken
        if trips is not None and self.session.protected is not None:
            trips = trips & self.session.protected
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
        """Mark where the choices begin that no reader sees."""
        assert self._own is not None
        self._own.look_ahead()
        if self._global_draws is not None:
            self._global_draws.mark()

    def _is_cleared(self, row: int, judged_ids: Tensor) -> bool:
        if self._checker is None or not bool(self.session.state.finite[row]):
            return False
        score = self.session.judged(row) + self.session.scanned[row] - 1
        return self._checker.clears(row, judged_ids[row].tolist(), score)

    def _close(self, sequences: Tensor) -> None:
        """Judge the tail of rows whose last token ended the loop. Draws no random number."""
        self._sort_late()
        active = self._rows.active
        if self._is_blind or (active is not None and not bool(active.any())):
            return
        assert self._own is not None
        self._scored += 1
        if not self._does(self._own.read_tail, sequences):
            return  # and nothing is released that was not judged
        self._judge((1, sequences.shape[1]), sequences)
        if self._trips is not None and self.session.protects:
            trips = self._rows.counted(self._trips)
            if self.session.protected is not None:
                trips = trips & self.session.protected
            for row in trips.nonzero()[:, 0].tolist():
                if not self._is_cleared(row, sequences):
                    self._rows.park(row, said=self._n_judged)

    def _settle(self, sequences: Tensor) -> None:
        """Bring the ends of rows to the host and compare beats with tokens, row by row."""
        assert self.settings is not None
        n_said = sequences.shape[1] - self._prompt_tokens
        self.ends = self._rows.ends(n_said)
        if self._is_blind:
            return
        try:
            self.session.require_quiet()
        except BeatError as error:
            self._rows.reopen()
            self._fail(error)
        for row, said in enumerate(self._rows.said(n_said)):
            judged = self.session.judged(row)
            if row not in self.session.trips and said != judged:
                self._mismatch(row, said, judged)
        self.ends = self._rows.ends(n_said)  # of rows that are closed by now too

    def _mismatch(self, row: int, content: int, judged: int) -> None:
        error = BeatError(f"row {row} has {content} tokens and {judged} scores, wanted one each.")
        self.session.errors.setdefault(row, error)
        if self._rows.closes:
            self._rows.park(row, said=self._n_judged, error=error)
