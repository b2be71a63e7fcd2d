"""Our `custom_generate`: the bare loop of transformers, watched, with a closing forward.

Knows the arguments that `generate` hands to a decoding method, which rows still count, and
the last forward of rows that end without EOS. Does not know text, redirects or traces.

The loop itself is `GenerationMixin._sample`, not a copy of it, so that a row that does not
trip is what bare `generate` makes it, draw for draw. A tripped row is *parked*: its monitor
is frozen and our criterion ends it, while its place in the batch, and so the draws of its
neighbours, stay as they were. Decoder-only models, one forward a token, eager execution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safe_decode.decoding import (
    CallSettings,
    Follower,
    PrefillSpan,
    WatchedCriteria,
    WatchedProcessors,
    settings_of,
    tail_inputs,
    whole_inputs,
)
from safe_decode.draws import RowDraws
from safe_decode.errors import BeatError, GuardError, NonFiniteError
from safe_decode.late import LateFlag
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
        self._span: PrefillSpan | None = None
        self._rescan: Callable[[], None] | None = None
        self._draws, self._follower = draws, follower
        self._said = 0
        self._scored = 0
        self._prompt_tokens = 0
        self._pad_id = 0
        self._do_sample = False
        self.pads_after_end = False
        self._is_blind = False
        self._any_parked = False
        self._end: Tensor | None = None
        self._scores: Tensor | None = None
        self._active: Tensor | None = None  # None: every row
        self._closing: Tensor | None = None
        self._parked: Tensor | None = None
        self._trips: Tensor | None = None
        self._ended_at: Tensor | None = None
        self._late: LateFlag | None = None  # where asking would wait
        self._unsorted: tuple[Tensor, Tensor, Tensor | None] | None = None

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
        self._measure(model, input_ids, generation_config, model_kwargs)
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
        self._close(model, sequences, model_kwargs)
        self._settle(sequences)
        if self._follower is not None:
            self._follower.on_end(self.session.trips)
        return self.generation

    def on_scores(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Judge the forward that made `scores` [batch, vocab]; comes last of all processors."""
        self._sort_late()
        self._scored += 1
        if not self._is_blind:
            positions = (1, input_ids.shape[1]) if self._said else self._prefilled(input_ids)
            self._judge(positions, input_ids)
        if self._do_sample and self._closes:
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
        newest = input_ids[:, -1]
        if self._is_calm(input_ids, done):
            self._tell(newest, done)
            return done
        trips = self._suspects(newest)
        flags = done if trips is None else done | trips
        if self._late is not None:
            self._late.send(flags)
            self._unsorted = (input_ids, done, trips)
            return flags if self._parked is None else flags | self._parked
        # The step's one wait for the host, just before the loop's own.
        if self._any_parked or self._closing is not None or bool(flags.any()):
            self._sort_rows(input_ids, done, trips)
        if self._parked is not None:
            done = done | self._parked
        self._tell(newest, done)
        return done

    def _tell(self, newest: Tensor, done: Tensor) -> None:
        if self._follower is not None:
            self._follower.on_choice(newest.tolist(), done.tolist(), self.session.trips)

    def _sort_late(self) -> None:
        """Do what `on_done` left, before the next forward is judged: nothing came between."""
        if self._unsorted is None or self._late is None:
            return
        unsorted, self._unsorted = self._unsorted, None
        if self._any_parked or self._closing is not None or self._late.read():
            self._sort_rows(*unsorted)

    def _prepare(self, input_ids: Tensor, criteria: Any, config: Any) -> None:  # noqa: ANN401
        self.settings = settings = settings_of(config, input_ids.shape[1])
        if self._require is not None:
            self._require(settings)
        if input_ids.shape[0] != self.session.batch:
            raise BeatError(
                f"generate runs {input_ids.shape[0]} rows, the session {self.session.batch}; "
                "open it for the expanded batch."
            )
        self._prompt_tokens = input_ids.shape[1]
        self._do_sample = settings.do_sample
        self._pad_id = settings.pad_id or 0
        self.pads_after_end = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        if settings.end_ids:
            self._end = torch.tensor(settings.end_ids, device=input_ids.device)
        if input_ids.is_cuda and self._follower is None and self._checker is None:
            # Who follows is told of each token, and a check asks at once: the host waits anyway.
            self._late = LateFlag(input_ids.device)
        if self._draws is not None:
            # Processors are built by now, the warpers of sampling included; the draw is ours.
            config.do_sample = False
        self._ended_at = input_ids.new_full(input_ids.shape[:1], -1)

    def _measure(
        self,
        model: Any,  # noqa: ANN401
        input_ids: Tensor,
        config: Any,  # noqa: ANN401
        model_kwargs: dict[str, Any],
    ) -> None:
        self._span = span = PrefillSpan.of(input_ids, config, model_kwargs)
        if span.is_partial and max(self.session.scanned) > span.positions:
            # Some of what is to be judged is cached: a turn continued call by call. Nobody
            # knows that it was judged then, so it passes once more.
            def rescan() -> None:
                inputs = whole_inputs(model, input_ids, model_kwargs, input_ids.shape[1])
                self.session.discard()
                model(**inputs, return_dict=True)

            self._rescan = rescan

    def _prefilled(self, input_ids: Tensor) -> tuple[int, ...]:
        assert self._span is not None
        if self._rescan is None:
            return (self._span.positions,)
        try:
            self._rescan()
        except Exception as error:  # whatever fails in the guard closes its rows
            from safe_decode.processor import as_guard_error

            self._fail(as_guard_error(error))
        return (input_ids.shape[1],)

    def _judge(self, positions: tuple[int, ...], ids: Tensor) -> None:
        try:
            self.session.note(ids)
            self._trips = self.session.judge(positions, self._active)
        except Exception as error:  # whatever fails in the guard closes its rows
            from safe_decode.processor import as_guard_error

            self._fail(as_guard_error(error))

    def _fail(self, error: GuardError) -> None:
        """Close every row that still counts; or go on without a guard, if that was allowed."""
        self._is_blind, self._trips = True, None
        session = self.session
        counts = [True] * session.batch if self._active is None else self._active.tolist()
        for row in (row for row, does_count in enumerate(counts) if does_count):
            if self._closes and session.policies[row].protects:
                session.park(row, said=max(0, self._scored - 1), error=error)
            session.errors.setdefault(row, error)
        if self._closes:
            parked = torch.tensor([row in session.trips for row in range(session.batch)])
            assert self._ended_at is not None
            self._parked, self._any_parked = parked.to(self._ended_at.device), True

    @property
    def _closes(self) -> bool:
        return self.session.protects and self.session.policy.on_error == "close"

    def _drawable(self, scores: Tensor) -> Tensor:
        """Keep a draw from failing for the whole batch where one row's scores are not finite."""
        # NaN and +Inf show in the maximum, and so does a row without any candidate.
        top = scores.amax(-1)
        if top.is_cpu and not self._any_parked and math.isfinite(sum(top.tolist())):
            return scores
        broken = top - top != 0
        if not self._any_parked and not bool(broken.any()):
            return scores
        forced = broken if self._parked is None else broken | self._parked
        counted = broken if self._active is None else broken & self._active
        self._park_nonfinite(counted.nonzero()[:, 0].tolist())
        return forced_scores(scores, dict.fromkeys(forced.nonzero()[:, 0].tolist(), self._pad_id))

    def _park_nonfinite(self, rows: list[int]) -> None:
        for row in rows:
            error = NonFiniteError(
                f"row {row} has NaN or Inf in its scores before token {self._scored - 1}, wanted "
                "finite scores; check the model's weights and dtype."
            )
            self._park(row, error)

    def _is_calm(self, input_ids: Tensor, done: Tensor) -> bool:
        """Say, on the CPU, that no row ended, tripped or is broken: the short way of most steps."""
        if self._active is not None or self._is_blind or not done.is_cpu or True in done.tolist():
            return False
        if not self.session.protects:
            return True
        if not self.session.is_quiet:
            return False
        if self._do_sample or self._scores is None or not self._closes:
            return True
        # A sum is finite if its terms are, but for sums that overflow: those look closer.
        return math.isfinite(sum(self._scores.gather(1, input_ids[:, -1:]).view(-1).tolist()))

    def _suspects(self, newest: Tensor) -> Tensor | None:
        if not self.session.protects:
            return None
        trips = None if self._is_blind else self._trips
        if not self._do_sample and self._scores is not None and self._closes:
            # Greedy picks NaN or Inf where there is any: the picked score tells of the row.
            picked = self._scores.gather(1, newest[:, None])[:, 0]
            broken = picked - picked != 0
            trips = broken if trips is None else trips | broken
        if trips is not None and self.session.protected is not None:
            trips = trips & self.session.protected
        if trips is not None and self._active is not None:
            trips = trips & self._active
        return trips

    def _sort_rows(self, input_ids: Tensor, done: Tensor, trips: Tensor | None) -> None:
        """Decide which rows the next forward judges. Not on the path while all rows go on."""
        assert self._ended_at is not None
        newest = input_ids[:, -1]
        if trips is not None:
            judged = [] if self._trips is None else self._trips.tolist()
            for row in trips.nonzero()[:, 0].tolist():
                if judged and judged[row]:
                    # The newest token is chosen, not judged: a look does not see it.
                    if not self._is_cleared(row, input_ids[:, :-1]):
                        self._park(row)
                else:
                    self._park_nonfinite([row])
        active = torch.ones_like(done) if self._active is None else self._active
        if self._parked is not None:
            active = active & ~self._parked
        if self._closing is not None:
            active = active & ~self._closing
        ends = done & (self._ended_at < 0)
        if self.pads_after_end:
            # A row that ends without EOS is judged once more: the next forward reads its tail.
            is_end = torch.zeros_like(done) if self._end is None else torch.isin(newest, self._end)
            active = active & ~(done & is_end)
            self._closing = done & active
        self._ended_at = torch.where(ends, torch.full_like(newest, self._said), self._ended_at)
        self._active = active

    def _is_cleared(self, row: int, judged_ids: Tensor) -> bool:
        if self._checker is None or not bool(self.session.state.finite[row]):
            return False
        score = self.session.judged(row) + self.session.scanned[row] - 1
        return self._checker.clears(row, judged_ids[row].tolist(), score)

    def _park(self, row: int, error: GuardError | None = None) -> None:
        assert self._ended_at is not None
        self.session.park(row, said=max(0, self._scored - 1), error=error)
        if self._parked is None:
            self._parked = torch.zeros_like(self._ended_at, dtype=torch.bool)
        self._parked[row] = True
        self._any_parked = True

    def _close(self, model: Any, sequences: Tensor, model_kwargs: dict[str, Any]) -> None:  # noqa: ANN401
        """Judge the tail of rows whose last token ended the loop. Draws no random number."""
        self._sort_late()
        if self._is_blind:
            return
        active = self._active
        if active is not None and not bool(active.any()):
            return
        assert self._span is not None
        self._scored += 1
        with torch.no_grad():
            try:
                if self._span.keeps_cache or self._span.is_full:
                    inputs = whole_inputs(model, sequences, model_kwargs, self._prompt_tokens)
                else:
                    inputs = tail_inputs(model, sequences, self._prompt_tokens, model_kwargs)
                model(**inputs, return_dict=True)
            except Exception as error:  # nothing may be released that was not judged
                from safe_decode.processor import as_guard_error

                self._fail(as_guard_error(error))
                return
        self._judge((1, sequences.shape[1]), sequences)
        if self._trips is not None and self.session.protects:
            trips = self._trips if active is None else self._trips & active
            if self.session.protected is not None:
                trips = trips & self.session.protected
            for row in trips.nonzero()[:, 0].tolist():
                if not self._is_cleared(row, sequences):
                    self._park(row)

    def _settle(self, sequences: Tensor) -> None:
        """Bring the ends of rows to the host and compare beats with tokens, row by row."""
        assert self._ended_at is not None and self.settings is not None
        said = sequences.shape[1] - self._prompt_tokens
        ends = self._ended_at.tolist()
        self.ended_at = [end if end >= 0 and self.pads_after_end else said for end in ends]
        if self._is_blind:
            return
        try:
            self.session.require_quiet()
        except BeatError as error:
            self._active = None
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
        if self._closes:
            self._park(row, error)
