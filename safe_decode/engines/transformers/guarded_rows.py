"""The rows of one call on a guarded model: sessions, continuations and traces that fit them.

Whoever runs rows (`SafeDecoder`'s calls, the server's batches) gets from here what holds for each
of them, so that both are judged, redirected and told in the same way. Knows the model, its guard
and what each row asked for. Does not know loops, readers or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safe_decode.activations.tap import ForwardRecorder
from safe_decode.bundle.summary import warnings_of
from safe_decode.engines.transformers.call_spec import (
    GuardedModel,
    RowSpec,
    span_reader,
    turn_of,
    void_reason,
)
from safe_decode.engines.transformers.loops.settings import CallSettings
from safe_decode.engines.transformers.rewind import Rewinder
from safe_decode.policy.reasoning import OpenTurn
from safe_decode.policy.self_check import SelfChecker
from safe_decode.prompts.batch import PromptBatch
from safe_decode.session.records import Redirected, RowRecord
from safe_decode.session.row_rng import RowRNG
from safe_decode.session.session import Session
from safe_decode.trace.writer import FinishedRow, TraceWriter

__all__ = ["GuardedRows"]


@dataclass(frozen=True)
class GuardedRows:
    """The rows of one call.

    Attributes:
        protected: The model and its guard.
        prompts: As the model runs them, sequences of one prompt repeated.
        specs: What holds for each row.
    """

    protected: GuardedModel
    prompts: PromptBatch
    specs: tuple[RowSpec, ...]

    def session(self, recorder: ForwardRecorder) -> Session:
        """Open the session of the rows; `recorder` is that of the tap, which listens."""
        rows = [
            spec.joining(scanned)
            for spec, scanned in zip(self.specs, self.prompts.scanned, strict=True)
        ]
        spans = span_reader(self.protected, self.prompts, self.specs)
        return self.protected.session(rows, recorder, spans)

    def room(self) -> list[int] | None:
        """Count, for each row, the new tokens for which the model's context has positions."""
        limit = self.protected.context_tokens
        if limit is None:
            return None
        lengths = self.prompts.lengths
        copies = len(self.specs) // len(lengths)
        return [limit - n for n in lengths for _ in range(copies)]

    def checker(self) -> SelfChecker | None:
        """Make what looks again at rows that alarm; None: every alarm trips."""
        protected, rows = self.protected, self.prompts
        if protected.self_check is None or rows.embeds is not None:
            return None
        check, tap, header = protected.self_check
        width = rows.input_ids.shape[1]
        starts = [width - len(rows.prompt_ids(row)) for row in range(len(self.specs))]
        limits = None
        if self.specs[0].first_threshold is not None:
            limits = [spec.certificate.threshold for spec in self.specs]
        return SelfChecker(
            check, protected.model, tap, header=header, starts=starts, thresholds=limits
        )

    def draws(self) -> RowRNG | None:
        """Return the generators of rows that draw for themselves; None: none does."""
        seeds = [spec.seed for spec in self.specs if spec.seed is not None]
        return RowRNG(seeds, self.protected.model.device) if seeds else None

    def void(self, row: int, settings: CallSettings) -> str | None:
        """Say why a row lies outside what was certified; None if it does not."""
        spec = self.specs[row]
        return void_reason(
            spec.certificate,
            settings,
            is_chat=self.prompts.is_chat[row],
            prefill_tokens=self.prompts.prefill_tokens[row],
            unseen_tokens=spec.policy.unseen_tokens,
            own_ends=self.protected.own_ends,
        )

    def rewinder(
        self,
        row: int,
        settings: CallSettings,
        options: Mapping[str, Any],
        stops: Callable[[Tensor], bool] | None = None,
    ) -> Rewinder:
        """Make what redirects a row that has tripped; see `Rewinder` for the arguments."""
        marks, spec = self.protected.marks, self.specs[row]
        turn = OpenTurn() if marks is None else turn_of(marks, self.prompts, row, spec)
        return Rewinder(self.protected, spec, settings, options, turn, stops)

    def finished(
        self,
        row: int,
        record: RowRecord,
        said: Sequence[int],
        *,
        redirected: Redirected | None = None,
        withheld: int = 0,
        ahead: tuple[int, ...] = (),
    ) -> FinishedRow:
        """Say what stands of a row that has ended.

        Args:
            row: Its index.
            record: What its session saw.
            said: Its generated ids, up to its end; what followed a trip is left out here.
            redirected: What became of it, if it has tripped.
            withheld: Last tokens of `said` that may not stand.
            ahead: Unseen ids that were judged behind it.
        """
        own = tuple(said)
        if record.trip is not None:
            own = own[: record.trip.cut.kept + record.trip.cut.dropped]
        ids = own[: record.judged - withheld] if withheld else own
        return FinishedRow(
            record,
            tuple(self.prompts.prompt_ids(row)),
            self.prompts.prefill_tokens[row],
            own,
            ids if redirected is None else redirected.ids,
            redirected,
            ahead=ahead,
            withheld=withheld,
        )

    def writer(self, row: int) -> TraceWriter:
        """Return what writes the trace of a row."""
        bundle, spec = self.protected.bundle, self.specs[row]
        return TraceWriter(
            bundle=bundle.digest,
            heads=bundle.probe.heads,
            low_mark=bundle.monitor.low_mark,
            certificate=spec.certificate,
            policy=spec.policy,
            reasoning=spec.reasoning,
            warnings=warnings_of(bundle, spec.certificate),
        )
