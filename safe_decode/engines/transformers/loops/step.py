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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from safe_decode.engines.transformers.loops.choices import ChoiceJudge
from safe_decode.engines.transformers.loops.extra_forwards import OwnForwards
from safe_decode.engines.transformers.loops.row_state import EndIds
from safe_decode.engines.transformers.loops.settings import (
    CallSettings,
    CriteriaList,
    Follower,
    PreparedSettings,
    ProcessorList,
    WatchedCriteria,
    chooses_end,
    models_ends,
    reweighs,
    settings_of,
)
from safe_decode.errors import BeatError
from safe_decode.host_copies import LateCopies, sent
from safe_decode.policy.self_check import SelfChecker
from safe_decode.session.row_rng import GlobalDraws, RowRNG
from safe_decode.session.session import Session
from safe_decode.session.turns import RowEnd
from safe_decode.typing import CausalLM

__all__ = ["StepLoop"]


class StepLoop(ChoiceJudge):
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
        super().__init__(session, draws=draws, follower=follower, checker=checker, room=room)
        self.settings: CallSettings | None = None
        self.ends: list[RowEnd] = []
        self.generation: Any = None
        self._require, self._reweighed = require, reweighed
        self._prompt_tokens = 0

    def ahead(self, row: int, n: int) -> tuple[int, ...]:
        """Return the first `n` unseen ids behind a row's response."""
        if not n or self.generation is None:
            return ()
        first = self._prompt_tokens + self.ends[row].content
        return tuple(self._ids[row][first : first + n])

    @cached_property
    def _ids(self) -> list[list[int]]:
        """All ids on the host, once the call has ended."""
        sequences: Tensor = getattr(self.generation, "sequences", self.generation)
        found: list[list[int]] = sequences.tolist()
        return found

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
        self._own = OwnForwards(model, input_ids, generation_config, model_kwargs)
        self._prepare(input_ids, generation_config)
        self._begin(model, input_ids, stopping_criteria)
        try:
            kind: Any = type(model)
            self.generation = kind._sample(
                model,
                input_ids,
                logits_processor=self._watched(input_ids, logits_processor),
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

    def _prepare(self, input_ids: Tensor, config: PreparedSettings) -> None:
        self.settings = settings = settings_of(config, input_ids.shape[1])
        if self._require is not None:
            self._require(settings)
        self._prompt_tokens = input_ids.shape[1]
        self._do_sample = settings.do_sample
        self._pad_id = settings.pad_id or 0
        if not input_ids.is_cpu:
            self._late = LateCopies(input_ids.device)
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

    def _watched(
        self, input_ids: Tensor, processors: ProcessorList
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what runs the processors and then judges; `_sample` only calls it.

        The guard's own is not in the list, which inspects each signature at each call.
        """
        from safe_decode.engines.transformers.loops.processor import SafetyLogitsProcessor

        ends, spared = self._forceable_ends(input_ids.device, processors)
        guard: Any = SafetyLogitsProcessor(self)

        def processed(ids: Tensor, scores: Tensor) -> Tensor:
            if ends is not None and spared is not None:
                self._own_ends = chooses_end(scores, ends) | spared
            judged: Tensor = guard(ids, processors(ids, scores))
            return judged

        return processed

    def _forceable_ends(
        self, device: torch.device, processors: ProcessorList
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return ids at which processors may end rows, None if none may, and the rows spared."""
        assert self.settings is not None
        rows = self._reweighed
        if rows is None:
            rows = [reweighs(processors)] * self.session.batch
        if not any(rows) or not self.settings.end_ids:
            return None, None
        spared = sent([not row for row in rows], device)
        return sent(self.settings.end_ids, device), spared

    def _take_back(self) -> None:
        """Leave the generator and a cache that outlives the call as bare `generate` does."""
        if self._global_draws is not None:
            self._global_draws.restore()
        if self._rows.bare_end is not None and self._own is not None:
            self._own.forget_ahead(self._rows.bare_end, self._said)

    def _close(self, sequences: Tensor) -> None:
        """Judge the tail of rows whose last token ended the loop. Draws no random number."""
        self._sort_late()
        if self._is_blind or not self._rows.any_active:
            return
        assert self._own is not None
        self._scored += 1
        if not self._does(self._own.read_tail, sequences):
            return  # and nothing is released that was not judged
        self._judge((1, sequences.shape[1]), sequences)
        if self._trips is not None and self.session.roster.protects:
            trips = self._rows.counted(self._trips)
            if self.session.roster.protected is not None:
                trips = trips & self.session.roster.protected
            for row, has_tripped in enumerate(trips.tolist()):
                if has_tripped and not self._is_cleared(row, sequences):
                    self._rows.park(row, said=self._n_judged)

    def _settle(self, sequences: Tensor) -> None:
        """Bring the ends of rows to the host and compare beats with tokens, row by row."""
        assert self.settings is not None
        n_said = sequences.shape[1] - self._prompt_tokens
        self.ends = self._rows.ends(n_said)
        if self._is_blind:
            return
        try:
            self.session.reader.require_quiet()
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
