"""What is right: the same conversations answered by `SafeDecoder` in this process.

Knows texts, outcomes and the five words for an answer. Does not know servers or HTTP.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.serving.client import Message, StreamedAnswer, conversations
from safe_decode.demo.embedded_pair import Embedded, embedded
from safe_decode.engines.transformers.decoder import SafeDecoder

__all__ = ["TOLERANCE", "Expected", "AnswerVerdict", "expected", "pair", "verdict_of"]

TOLERANCE = 1e-3
"""Of a statistic, float32: within it of the threshold, decisions may differ with the batch."""

AnswerVerdict = Literal["right", "left", "lost", "unguarded", "mixed_up", "wrong"]
"""right: text, action and end are those of the decoder. left: the client went, and what it had
seen is how the right answer begins. lost: no last chunk, no `[DONE]`, cut off, or tokens that the
usage counts and no chunk brought. unguarded: no mark of the bundle in header or last chunk, or
released where the decoder trips. mixed_up: chunks of several responses in one stream, or another
conversation's answer. wrong: any other difference."""

_BATCH = 32


@dataclass(frozen=True)
class Expected:
    """A conversation and its right answer.

    Attributes:
        messages: The conversation.
        text: All that its reader gets.
        action: What becomes of it.
    """

    messages: list[Message]
    text: str
    action: str


@functools.cache
def pair() -> Embedded:
    """The embedded pair, loaded once."""
    return embedded()


def expected(share: float = 1.0) -> list[Expected]:
    """Answer the held-out conversations, as the server does when nothing else is asked.

    Args:
        share: How many of them, evenly spread.

    Returns:
        Those whose statistic keeps its distance from the threshold at every step.
    """
    torch.set_num_threads(1)
    own = pair()
    decoder = SafeDecoder(own.model, own.tokenizer, own.bundle, redirect="rewind")
    certificate = decoder.certificate
    asked = conversations()
    asked = asked[:: max(1, round(1 / share))] if share < 1 else asked
    found = []
    for start in range(0, len(asked), _BATCH):
        batch = asked[start : start + _BATCH]
        given = [m[-1]["content"] if m[-1]["role"] == "assistant" else None for m in batch]
        output = decoder.generate(
            [m if g is None else m[:-1] for m, g in zip(batch, given, strict=True)],
            prefill=given,
            max_new_tokens=certificate.envelope.max_new_tokens,
            do_sample=False,
        )
        for messages, text, trace in zip(batch, output.texts, output.traces, strict=True):
            distances = (abs(step.statistic - certificate.threshold) for step in trace.steps)
            if min(distances) > TOLERANCE:
                found.append(Expected(messages, text, str(trace.end.outcome)))
    return found


def verdict_of(
    answer: StreamedAnswer, index: int, right: Sequence[Expected], bundle: str
) -> AnswerVerdict:
    """Judge one answer.

    Args:
        answer: With status 200.
        index: Of its conversation in `right`.
        right: All conversations that were asked.
        bundle: What it must be marked with.
    """
    own = right[index]
    if len(answer.chunk_ids) > 1:
        return "mixed_up"
    if answer.marker != bundle:
        return "unguarded"
    if answer.has_left:
        return "left" if own.text.startswith(answer.text) else "wrong"
    if _is_lost(answer):
        return "lost"
    if answer.bundle != bundle or (own.action != "released" and answer.action == "released"):
        return "unguarded"
    if answer.text == own.text and answer.action == own.action:
        return "right"
    texts = Counter(other.text for other in right)
    return "mixed_up" if answer.text != own.text and texts[answer.text] else "wrong"


def _is_lost(answer: StreamedAnswer) -> bool:
    if answer.finish_reason is None or not answer.has_done or answer.action == "cut":
        return True
    return answer.counted != len(answer.tokens)
