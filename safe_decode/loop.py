"""Our `custom_generate`: the bare loop of transformers, watched, with a closing forward.

Knows the arguments that `generate` hands to a decoding method, which rows still count, and
the last forward of rows that end without EOS. Does not know text, redirects or traces.

The loop itself is `GenerationMixin._sample`, not a copy of it, so that a row that does not
trip is what bare `generate` makes it, draw for draw. A tripped row is *parked*: its monitor
is frozen and our criterion ends it, while its place in the batch, and so the draws of its
neighbours, stay as they were. Decoder-only models, one forward a token, eager execution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from safe_decode.decoding import (
    CallSettings,
    Follower,
    WatchedCriteria,
    WatchedProcessors,
    settings_of,
)
from safe_decode.draws import RowDraws
from safe_decode.errors import BeatError, GuardError, NonFiniteError
from safe_decode.finite import all_finite, broken, chosen, picked, top
from safe_decode.late import LateFlag
from safe_decode.open_rows import OpenRows
from safe_decode.own_forwards import OwnForwards
from safe_decode.redirect import forced_scores
from safe_decode.selfcheck import SelfChecker
from safe_decode.session import Session

__all__ = ["GuardedLoop"]


class GuardedLoop:
    """A decoding method for `model.generate(custom_generate=...)`; good for one call.

    Args:
        session: For the rows of this call, already expanded by num_return_sequences.
        require: Called with the settings before the first forward; may raise.
        draws: Draws each row's tokens instead of the global generator.
        follower: Hears of each choice.
        checker: Looks again at rows that alarm, and may clear them.
    """

    def __init__(
        self,
        session: Session,
        *,
        require: Callable[[CallSettings], None] | None = None,
        draws: RowDraws | None = None,
        follower: Follower | None = None,
        checker: SelfChecker | None = None,
    ) -> None:
        self.session = session
        self._checker = checker
        if checker is not None:
            session.looks = checker.looks
        self.settings: CallSettings | None = None
        self._require = require
        self.ended_at: list[int] = []
        self.generation: Any = None
        self._own: OwnForwards | None = None
        self._draws, self._follower = draws, follower
        self._said = 0
        self._scored = 0
        self._prompt_tokens = 0
        self._pad_id = 0
        self._do_sample = False
        self._is_blind = False
        self._rows = OpenRows(session)
        self._scores: Tensor | None = None
        self._trips: Tensor | None = None
        self._late: LateFlag | None = None  # where asking would wait
        self._unsorted: tuple[Tensor, Tensor, Tensor | None] | None = None

    @property
    def pads_after_end(self) -> bool:
        """Say whether a row that has ended goes on with pads."""
        return self._rows.pads_after_end

    def __call__(
        self,
        model: Any,  # noqa: ANN401 - duck-typed
        input_ids: Tensor,
        logits_processor: Any,  # noqa: ANN401 - a LogitsProcessorList
        stopping_criteria: Any,  # noqa: ANN401 - a StoppingCriteriaList
        generation_config: Any,  # noqa: ANN401 - a GenerationConfig, prepared
        **model_kwargs: Any,  # noqa: ANN401 - what the forward takes
    ) -> Any:  # noqa: ANN401 - as the method that it stands for
        """Generate.

        Returns:
            What bare `generate` returns: ids [batch, seq], or its output object; what a
            parked row holds after its trip is not to be read.

        Raises:
            Exception: What the model, or a processor of the user's, raises.
        """
        from safe_decode.processor import SafetyLogitsProcessor

        self._prepare(input_ids, stopping_criteria, generation_config)
        self._own = OwnForwards(model, input_ids, generation_config, model_kwargs)
        processors = WatchedProcessors(logits_processor, SafetyLogitsProcessor(self))
        self.generation = type(model)._sample(
            model,
            input_ids,
            logits_processor=processors,
            stopping_criteria=WatchedCriteria(stopping_criteria, self),
            generation_config=generation_config,
            **model_kwargs,
        )
        sequences: Tensor = getattr(self.generation, "sequences", self.generation)
        self._close(sequences)
        self._settle(sequences)
        if self._follower is not None:
            self._follower.on_end(self.session.trips)
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
            done = self._rows.and_parked(done)
            self._tell(input_ids, done)
            return done
        trips = self._suspects(input_ids)
        flags = done if trips is None else done | trips
        if self._late is not None:
            self._late.send(flags)
            self._unsorted = (input_ids, done, trips)
            return self._rows.and_parked(flags)
        # The step's one wait for the host, just before the loop's own.
        if not self._rows.are_even or bool(flags.any()):
            self._sort_rows(input_ids, done, trips)
        done = self._rows.and_parked(done)
        self._tell(input_ids, done)
        return done

    def _tell(self, input_ids: Tensor, done: Tensor) -> None:
        if self._follower is not None:
            self._follower.on_choice(input_ids[:, -1].tolist(), done.tolist(), self.session.trips)

    def _sort_late(self) -> None:
        """Do what `on_done` left, before the next forward is judged: nothing came between."""
        if self._unsorted is None or self._late is None:
            return
        unsorted, self._unsorted = self._unsorted, None
        if not self._rows.are_even or self._late.read():
            self._sort_rows(*unsorted)

    def _prepare(self, input_ids: Tensor, criteria: Any, config: Any) -> None:  # noqa: ANN401
        self.settings = settings = settings_of(config, input_ids.shape[1])
        if self._require is not None:
            self._require(settings)
        pads_after_end = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._rows.begin(input_ids, settings.end_ids, pads_after_end=pads_after_end)
        self._prompt_tokens = input_ids.shape[1]
        self._do_sample = settings.do_sample
        self._pad_id = settings.pad_id or 0
        if input_ids.is_cuda and self._follower is None and self._checker is None:
            # Who follows is told of each token, and a check asks at once: the host waits anyway.
            self._late = LateFlag(input_ids.device)
        if self._draws is not None:
            # Processors are built by now, the warpers of sampling included; the draw is ours.
            config.do_sample = False

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
            from safe_decode.processor import as_guard_error

            self._fail(as_guard_error(error))
            return False
        return True

    def _judge(self, positions: tuple[int, ...], ids: Tensor) -> None:
        try:
            self.session.note(ids)
            self._trips = self.session.judge(positions, self._rows.active)
        except Exception as error:  # whatever fails in the guard closes its rows
            from safe_decode.processor import as_guard_error

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

    def _sort_rows(self, input_ids: Tensor, done: Tensor, trips: Tensor | None) -> None:
        """Park what tripped and see who goes on. Not on the path while all rows go on."""
        if trips is not None:
            judged = [] if self._trips is None else self._trips.tolist()
            for row in trips.nonzero()[:, 0].tolist():
                if judged and judged[row]:
                    # The newest token is chosen, not judged: a look does not see it.
                    if not self._is_cleared(row, input_ids[:, :-1]):
                        self._rows.park(row, said=self._n_judged)
                else:
                    self._park_nonfinite([row])
        self._rows.go_on(input_ids[:, -1], done, self._said)

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
        self.ended_at = self._rows.ends(sequences.shape[1] - self._prompt_tokens)
        if self._is_blind:
            return
        try:
            self.session.require_quiet()
        except BeatError as error:
            self._rows.active = None
            self._fail(error)
        new = sequences[:, self._prompt_tokens :].tolist()
        for row, n_ids in enumerate(self.ended_at):
            closed = self.pads_after_end and new[row][n_ids - 1] in self.settings.end_ids
            content, judged = n_ids - closed, self.session.judged(row)
            if row not in self.session.trips and content != judged:
                self._mismatch(row, content, judged)

    def _mismatch(self, row: int, content: int, judged: int) -> None:
        error = BeatError(f"row {row} has {content} tokens and {judged} scores, wanted one each.")
        self.session.errors.setdefault(row, error)
        if self._rows.closes:
            self._rows.park(row, said=self._n_judged, error=error)
