"""One guarded call: its rows run under a session, tripped rows are redirected, all is told.

Knows how sessions, loops and redirects follow each other within a call, and what each row's
request asked for. Does not know prompts as text, threads, or how options are checked. A call
is run once and holds nothing of a model afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safe_decode.engines.transformers.call_spec import (
    CallMode,
    GuardedModel,
    RowSpec,
    StreamSink,
)
from safe_decode.engines.transformers.coverage import given_options
from safe_decode.engines.transformers.guarded_rows import GuardedRows
from safe_decode.engines.transformers.loops.extra_forwards import forget
from safe_decode.engines.transformers.loops.padding import padded
from safe_decode.engines.transformers.loops.settings import CallSettings
from safe_decode.engines.transformers.loops.step import StepLoop
from safe_decode.engines.transformers.loops.whole_response import (
    WholeResponseLoop,
    picked_rows,
)
from safe_decode.engines.transformers.output import (
    GuardedOutput,
    finish_reason,
    matched_generation,
    standing_of,
)
from safe_decode.engines.transformers.rewind import continued_options
from safe_decode.errors import CertificateError
from safe_decode.prompts.batch import PromptBatch
from safe_decode.session.records import Redirected
from safe_decode.session.session import RowRecord, Session
from safe_decode.session.turns import RowEnd
from safe_decode.streaming.batch_release import Releaser
from safe_decode.streaming.release import Cancelled, ReleaseRules, RowRelease
from safe_decode.trace.writer import FinishedRow, LazyTraces
from safe_decode.typing import Tokenizer

__all__ = ["GuardedCall"]

Loop = StepLoop | WholeResponseLoop


class GuardedCall:
    """One call, checked and encoded.

    Args:
        protected: The model and its guard.
        inputs: The batch as the user gave it.
        rows: The batch as `generate` will run it, sequences of one prompt repeated.
        rules: One a row of `rows`.
        options: Keyword arguments for `model.generate`.
        mode: How it decodes.
    """

    def __init__(
        self,
        protected: GuardedModel,
        inputs: PromptBatch,
        rows: PromptBatch,
        rules: Sequence[RowSpec],
        options: Mapping[str, Any],
        mode: CallMode,
    ) -> None:
        self._protected, self._inputs, self.mode = protected, inputs, mode
        self._rows = GuardedRows(protected, rows, tuple(rules))
        self._options = dict(options)
        self._given = given_options(options)  # before the call runs: it fills a cache

    @property
    def batch(self) -> int:
        """Count the rows that run."""
        return len(self._rows.specs)

    @property
    def prompt(self) -> Tensor:
        """Prompts as given, [batch, seq] ids."""
        return self._inputs.input_ids

    def run(self, watch: StreamSink | None = None) -> GuardedOutput:
        """Run the call to its end, or until its reader wants no more.

        Args:
            watch: Who reads it while it runs; None: nobody.

        Returns:
            What stands of each row. After a cancellation, `sequences` is the prompt alone.
        """
        protected = self._protected
        with protected.tap.listening() as recorder, torch.no_grad():
            session = self._rows.session(recorder)
            releaser = None if watch is None else self._releaser(watch)
            loop = self._loop(session, releaser)
            cache, cached = self._users_cache()
            try:
                protected.model.generate(
                    **self._model_inputs(), custom_generate=loop, **self._options
                )
            except Cancelled:
                sequences = None
            else:
                sequences = getattr(loop.generation, "sequences", loop.generation)
            if cache is not None and (session.trips or sequences is None):
                forget(cache, cached)
        return self._finished(session, loop, sequences, releaser, watch)

    def _loop(self, session: Session, follower: Releaser | None) -> Loop:
        if self.mode.method != "step":
            return WholeResponseLoop(
                session,
                self.mode.method,
                require=self._require,
                assistant=self.mode.assistant,
                room=self._rows.room(),
            )
        return StepLoop(
            session,
            require=self._require,
            draws=self._rows.draws(),
            follower=follower,
            checker=self._rows.checker(),
            room=self._rows.room(),
        )

    def _model_inputs(self) -> dict[str, Any]:
        inputs = self._inputs
        prompt = (
            {"inputs_embeds": inputs.embeds}
            if inputs.embeds is not None
            else {"input_ids": inputs.input_ids}
        )
        return {**prompt, "attention_mask": inputs.attention_mask}

    def _users_cache(self) -> tuple[Any, int]:
        cache = self._options.get("past_key_values")
        return cache, 0 if cache is None else int(cache.get_seq_length())

    def _voids(self, settings: CallSettings) -> list[str | None]:
        settings = replace(settings, options={**settings.options, **self._given})
        return [self._rows.void(row, settings) for row in range(self.batch)]

    def _require(self, settings: CallSettings) -> None:
        reason = next((reason for reason in self._voids(settings) if reason is not None), None)
        if self._protected.strict and reason is not None:
            raise CertificateError(
                f"the call is outside the certified envelope: {reason}; stay inside it, certify "
                "for it, or pass strict=False."
            )

    def _releaser(self, watch: StreamSink) -> Releaser:
        rules = ReleaseRules(watch.stop_strings, watch.includes_stop)
        rows = [
            RowRelease(
                row,
                self._protected.tokenizer,
                holdback_tokens=spec.policy.holdback_tokens,
                redirect=spec.policy.redirect,
                rules=rules,
                emit=watch.emit,
                is_cancelled=watch.is_cancelled,
            )
            for row, spec in enumerate(self._rows.specs)
        ]
        return Releaser(rows)

    def _finished(
        self,
        session: Session,
        loop: Loop,
        sequences: Tensor | None,
        releaser: Releaser | None,
        watch: StreamSink | None,
    ) -> GuardedOutput:
        """Redirect what tripped and tell the rest; `sequences` is None after a cancellation."""
        assert loop.settings is not None
        settings, voids = loop.settings, self._voids(loop.settings)
        width = self._inputs.input_ids.shape[1]
        ids = [] if sequences is None else sequences.tolist()
        records = session.records()
        mode = self.mode
        picked, pruned = picked_rows(session, loop.ends, mode.n_candidates, mode.n_returned)
        outcomes = []
        for row in picked:
            record = records[row]
            reader = None if releaser is None else releaser.rows[row]
            end = None if sequences is None else loop.ends[row]
            if end is not None:
                n_said = max(end.n_ids, end.content)
                said = tuple(ids[row][width : width + n_said])
            else:
                assert reader is not None
                said = reader.said_ids
            outcome = self._outcome(row, record, said, settings, reader, end)
            outcome = replace(
                outcome,
                pruned_beams=pruned[row // self.mode.n_candidates],
                ahead=loop.ahead(row, record.ahead),
            )
            outcomes.append(outcome)
            if reader is not None and watch is not None:
                trace = self._rows.writer(row).trace(outcome, voids[row])
                watch.emit(reader.ended(finish_reason(outcome, reader, settings), trace))
        return self._output(picked, outcomes, voids, loop)

    def _outcome(
        self,
        row: int,
        record: RowRecord,
        said: tuple[int, ...],
        settings: CallSettings,
        reader: RowRelease | None,
        end: RowEnd | None,
    ) -> FinishedRow:
        withheld = 0 if end is None else end.withheld
        try:
            if reader is not None and not reader.is_over:
                raise Cancelled
            redirected = self._redirected(row, record, said, settings, reader)
            return self._rows.finished(row, record, said, redirected=redirected, withheld=withheld)
        except Cancelled:
            assert reader is not None
            told = replace(self._rows.finished(row, record, said), said=said)
            ids, released = tuple(reader.token_ids), reader.released_tokens
            return replace(told, ids=ids, cancelled_after=released)

    def _redirected(
        self,
        row: int,
        record: RowRecord,
        said: Sequence[int],
        settings: CallSettings,
        reader: RowRelease | None,
    ) -> Redirected | None:
        """Let a row that has tripped end as it is to; None if it has not tripped."""
        trip = record.trip
        if trip is None:
            return None
        prompts = self._rows.prompts
        return self._rows.rewinder(row, settings, continued_options(self._options)).redirect(
            trip,
            row=row,
            prompt=prompts.prompt_ids(row),
            prefill_tokens=prompts.prefill_tokens[row],
            said=said[: trip.cut.kept + trip.cut.dropped],
            reader=reader,
        )

    def _output(
        self,
        picked: Sequence[int],
        outcomes: Sequence[FinishedRow],
        voids: Sequence[str | None],
        loop: Loop,
    ) -> GuardedOutput:
        assert loop.settings is not None
        settings = loop.settings
        answers = [outcome.ids for outcome in outcomes]
        fill = loop.fill_id if isinstance(loop, WholeResponseLoop) else settings.pad_id or 0
        sequences = padded(self._inputs.input_ids, answers, fill)
        generation = None
        if loop.generation is not None and not isinstance(loop.generation, Tensor):
            rows = [standing_of(row, o) for row, o in zip(picked, outcomes, strict=True)]
            generation = matched_generation(loop.generation, sequences, rows, loop.bare_steps)
        told = [
            (self._rows.writer(row), outcome, voids[row])
            for row, outcome in zip(picked, outcomes, strict=True)
        ]
        return GuardedOutput(
            sequences=sequences,
            texts=[self._text(ids, settings.end_ids) for ids in answers],
            traces=LazyTraces(told),
            generation=generation,
            decode=partial(_decoded, self._protected.tokenizer),
        )

    def _text(self, ids: Sequence[int], end_ids: Sequence[int]) -> str:
        # An end id is no content: nobody judged it, so its text, if it has any, is not shown.
        ids = ids[:-1] if ids and ids[-1] in end_ids else ids
        return _decoded(self._protected.tokenizer, ids)


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
