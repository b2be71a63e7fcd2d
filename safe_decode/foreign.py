"""The guard inside a `generate` that is not ours: what a user holds of it, and its traces.

Knows the processor, the criterion and how a foreign loop ended. Does not know prompts as
text or how the guard was set up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safe_decode.inputs import GuardInputs
from safe_decode.outcome import BareEnd, Judgement, Outcome
from safe_decode.session import RowRecord
from safe_decode.trace import SafetyTrace

if TYPE_CHECKING:
    from safe_decode.processor import GuardedSteps

__all__ = ["GuardHandle", "bare_traces"]

_VOID = "the options of a foreign generate are not seen"


class GuardHandle:
    """The guard in a user's own `model.generate`; see `SafeDecoder.processor`.

    Attributes:
        logits_processor: Goes last into `logits_processor=[...]`.
        stopping_criteria: Goes into `stopping_criteria=[...]`.
        traces: One a row, filled when the context ends.
    """

    def __init__(self, logits_processor: Any, stopping_criteria: Any) -> None:  # noqa: ANN401
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.traces: list[SafetyTrace] = []


def bare_traces(steps: GuardedSteps, rows: GuardInputs, judgement: Judgement) -> list[SafetyTrace]:
    """Write the traces of a foreign loop; its settings are unknown, so is the envelope."""
    return [
        judgement.trace(_outcome(steps, rows, row, steps.said(row), record), _VOID)
        for row, record in enumerate(steps.session.records())
    ]


def _outcome(
    steps: GuardedSteps,
    rows: GuardInputs,
    row: int,
    said: Sequence[int],
    record: RowRecord,
) -> Outcome:
    return Outcome(
        record=record,
        prompt=tuple(rows.prompt_ids(row)),
        prefill_tokens=rows.prefill_tokens[row],
        said=tuple(said),
        ids=tuple(said),
        bare=BareEnd(is_truncated=steps.is_truncated(row), unscored_tail=steps.unscored_tail(row)),
    )
