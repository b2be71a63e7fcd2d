"""The terms of one call: what guards it, what holds for each row, who reads it, how it decodes.

Knows names for what a call is given. Does not know how it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from safe_decode.activations.tap import ActivationTap, ForwardRecorder
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.certificate import Certificate, Envelope
from safe_decode.engines.transformers.coverage import ENDS, departure, recorded
from safe_decode.engines.transformers.loops.settings import CallSettings
from safe_decode.engines.transformers.loops.whole_response import Method
from safe_decode.policy.policy import Policy
from safe_decode.policy.reasoning import OpenTurn, SpanMarks, SpanReader
from safe_decode.policy.redirect import CannedTexts
from safe_decode.policy.self_check import SelfCheck
from safe_decode.probe.interface import Probe
from safe_decode.prompts.batch import PromptBatch
from safe_decode.session.session import Session, SessionRow
from safe_decode.streaming.events import StreamEvent
from safe_decode.typing import CausalLM, Tokenizer

__all__ = [
    "CallMode",
    "GuardedModel",
    "RowSpec",
    "StreamSink",
    "span_reader",
    "turn_of",
    "void_reason",
]


@dataclass(frozen=True)
class GuardedModel:
    """A model and all that guards it; the same for every call of a decoder.

    Attributes:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        bundle: Made for it.
        tap: On the bundle's sites.
        probe: The bundle's, on the model's device.
        strict: Whether calls outside a certificate's envelope are refused.
        context_tokens: Positions the model has, or None if it does not say.
        self_check: Looks again at alarms, with its tap and the ids of the header; or None.
        marks: Of reasoning, where the bundle has thresholds for it; or None.
        own_ends: End ids of the model's generation configuration when it was wrapped, ascending.
    """

    model: CausalLM
    tokenizer: Tokenizer
    bundle: ProbeBundle
    tap: ActivationTap
    probe: Probe
    strict: bool
    context_tokens: int | None
    self_check: tuple[SelfCheck, ActivationTap, tuple[int, ...]] | None = None
    marks: SpanMarks | None = None
    own_ends: tuple[int, ...] = ()

    def session(
        self,
        rows: Sequence[SessionRow],
        recorder: ForwardRecorder,
        spans: SpanReader | None = None,
    ) -> Session:
        """Open a session for rows that the model is about to run; every session comes from here.

        Args:
            rows: What holds for each.
            recorder: Of the tap, which listens.
            spans: Follows marked reasoning; None: there is none.
        """
        return Session(
            probe=self.probe,
            config=self.bundle.monitor,
            rows=rows,
            recorder=recorder,
            device=self.model.device,
            spans=spans,
        )


@dataclass(frozen=True)
class RowSpec:
    """What holds for one row.

    Attributes:
        policy: Its redirect and hold-back.
        certificate: Its threshold.
        texts: Its canned ids.
        seed: Of its draws; None: the global generator.
        first_threshold: Of the first stage, where `certificate` speaks of the second; or None.
        reasoning: Certificate of the threshold inside marked spans; or None.
    """

    policy: Policy
    certificate: Certificate
    texts: CannedTexts
    seed: int | None = None
    first_threshold: float | None = None
    reasoning: Certificate | None = None

    @property
    def shift(self) -> float:
        """By how much the threshold inside marked spans exceeds the one outside."""
        return 0.0 if self.reasoning is None else self.reasoning.threshold - self.threshold

    def joining(self, scanned: int) -> SessionRow:
        """Describe the row to its session; `scanned` positions of its prompt are judged."""
        return SessionRow(self.threshold, self.policy, scanned)

    @property
    def threshold(self) -> float:
        """What the statistic is compared with."""
        first = self.first_threshold
        return self.certificate.threshold if first is None else first


@dataclass(frozen=True)
class CallMode:
    """How a call decodes.

    Attributes:
        method: See `safe_decode.engines.transformers.loops.whole_response.Method`.
        n_candidates: Rows that run for one prompt.
        n_returned: Rows of them that are returned.
        assistant: Keyword arguments of assisted decoding.
    """

    method: Method = "step"
    n_candidates: int = 1
    n_returned: int = 1
    assistant: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamSink:
    """Who reads a call while it runs.

    Attributes:
        emit: Takes the events.
        is_cancelled: Asked at each choice.
        stop_strings: As given to `generate`.
        includes_stop: Whether the text keeps the stop string that ended it.
    """

    emit: Callable[[StreamEvent], None]
    is_cancelled: Callable[[], bool] = field(default=lambda: False)
    stop_strings: tuple[str, ...] = ()
    includes_stop: bool = True


def span_reader(
    protected: GuardedModel, rows: PromptBatch, rules: Sequence[RowSpec]
) -> SpanReader | None:
    """Follow the reasoning of a batch; None where the bundle has no thresholds for it.

    Embeddings have no ids to follow: there the answer's threshold holds throughout.
    """
    if protected.marks is None or rows.embeds is not None:
        return None
    width, turns = rows.input_ids.shape[1], []
    for row, rule in enumerate(rules):
        turn = turn_of(protected.marks, rows, row, rule)
        turns.append(replace(turn, start=width - turn.given))
    return SpanReader(protected.marks, turns, protected.model.device)


def turn_of(marks: SpanMarks, rows: PromptBatch, row: int, rules: RowSpec) -> OpenTurn:
    """Describe a row's open turn, `start` counted without padding."""
    return marks.turn(
        rows.prompt_ids(row),
        rows.prefill_tokens[row],
        is_chat=rows.is_chat[row],
        shift=rules.shift,
    )


def void_reason(
    certificate: Certificate,
    settings: CallSettings,
    *,
    is_chat: bool,
    prefill_tokens: int = 0,
    unseen_tokens: int = 0,
    own_ends: Sequence[int] = (),
) -> str | None:
    """Say why a call lies outside what was certified; None if it does not.

    A response trips by its largest score. What was begun for the model is judged too, and so is
    what is decoded unseen behind its cap: it is the length of all together that was certified.

    Args:
        certificate: In force.
        settings: Of the call.
        is_chat: Whether the prompt has an open assistant turn.
        prefill_tokens: Of that turn, supplied.
        unseen_tokens: Decoded behind a response that its cap ends.
        own_ends: End ids of the model as it was wrapped.
    """
    if not is_chat:
        return "a raw completion has no assistant turn, and responses of chats were certified"
    certified = certificate.envelope.max_new_tokens
    cap = settings.max_new_tokens
    if (prefill_tokens or unseen_tokens) and prefill_tokens + cap + unseen_tokens > certified:
        begun = f"a prefill of {prefill_tokens} tokens, " if prefill_tokens else ""
        behind = f" and {unseen_tokens} unseen ones behind it" if unseen_tokens else ""
        return f"{begun}max_new_tokens={cap}{behind} exceed {certified} together"
    call = Envelope(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.do_sample,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        options={**settings.options, ENDS: recorded(settings.end_ids)},
    )
    return departure(certificate.envelope, call, own_ends)
