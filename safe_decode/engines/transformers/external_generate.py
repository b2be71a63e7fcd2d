"""The guard inside a `generate` that is not ours: what a user holds of it, and its traces.

Knows the processor, the criterion and how a foreign loop begins and ends. Does not know prompts
as text, or what callers may ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from safe_decode.engines.transformers.call_spec import GuardedModel, RowSpec
from safe_decode.engines.transformers.guarded_rows import GuardedRows
from safe_decode.errors import ForcedTokenError
from safe_decode.prompts.batch import PromptBatch
from safe_decode.session.records import RowRecord
from safe_decode.trace.schema import SafetyTrace
from safe_decode.trace.writer import BareEnd, FinishedRow

if TYPE_CHECKING:
    from transformers import LogitsProcessor, StoppingCriteria

    from safe_decode.engines.transformers.loops.external_steps import GuardedSteps

__all__ = ["GuardHandle", "guarded"]

_VOID = "the options of a foreign generate are not seen"


class GuardHandle:
    """The guard in a user's own `model.generate`; see `SafeDecoder.processor`.

    Attributes:
        logits_processor: Goes last into `logits_processor=[...]`.
        stopping_criteria: Goes into `stopping_criteria=[...]`.
        traces: One a row, filled when the context ends, by an exception too.
    """

    def __init__(
        self, logits_processor: LogitsProcessor, stopping_criteria: StoppingCriteria
    ) -> None:
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.traces: list[SafetyTrace] = []


@contextmanager
def guarded(
    protected: GuardedModel,
    inputs: PromptBatch,
    rules: RowSpec,
    *,
    n_sequences: int,
    end_ids: Sequence[int],
    pad_id: int | None,
) -> Iterator[GuardHandle]:
    """Guard a `model.generate` that is not ours.

    Args:
        protected: The model and its guard.
        inputs: The batch that `generate` is given.
        rules: For every row.
        n_sequences: Rows that `generate` makes of each prompt.
        end_ids: EOS ids; empty where the model has none.
        pad_id: Fills ended rows.

    Raises:
        BeatError: At the end: forwards passed that the processor never judged.
    """
    from safe_decode.engines.transformers.loops.external_steps import GuardedSteps
    from safe_decode.engines.transformers.loops.processor import (
        SafetyLogitsProcessor,
        SafetyStoppingCriteria,
    )

    prompts = inputs.repeated(n_sequences)
    rows = GuardedRows(protected, prompts, (rules,) * len(prompts.scanned))
    with protected.tap.listening() as recorder:
        session = rows.session(recorder)
        steps = GuardedSteps(
            session,
            prompt_tokens=inputs.input_ids.shape[1],
            refusal_ids=rules.texts.refusal,
            refusal_after_ids=rules.texts.refusal_after,
            end_ids=end_ids,
            pad_id=pad_id,
        )
        handle = GuardHandle(SafetyLogitsProcessor(steps), SafetyStoppingCriteria(steps))
        try:
            yield handle
            steps.finish()
        finally:
            with suppress(ForcedTokenError):  # where the loop has ended otherwise
                steps.hear(None)
            handle.traces = _traces(steps, rows)


def _traces(steps: GuardedSteps, rows: GuardedRows) -> list[SafetyTrace]:
    """Write the traces of a foreign loop; its settings are unknown, so is the envelope."""
    return [
        rows.writer(row).trace(_finished(steps, rows.prompts, row, record), _VOID)
        for row, record in enumerate(steps.session.records())
    ]


def _finished(
    steps: GuardedSteps, prompts: PromptBatch, row: int, record: RowRecord
) -> FinishedRow:
    said = tuple(steps.said(row))
    return FinishedRow(
        record=record,
        prompt=tuple(prompts.prompt_ids(row)),
        prefill_tokens=prompts.prefill_tokens[row],
        said=said,
        ids=said,
        bare=BareEnd(is_truncated=steps.is_truncated(row), unscored_tail=steps.unscored_tail(row)),
    )
