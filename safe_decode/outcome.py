"""One finished row: what it says in the end, and the trace of how it came to that.

Knows records, redirects and certificates' envelopes. Does not know tensors, models in
motion or hooks; everything here is built once, after the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safe_decode.certificate import Certificate
from safe_decode.loop import CallSettings
from safe_decode.rewind import Redirected, Rewinder
from safe_decode.session import RowRecord
from safe_decode.trace import SafetyTrace

__all__ = ["Outcome", "outcome_of", "trace_of", "void_reason"]


@dataclass(frozen=True)
class Outcome:
    """One finished row.

    Attributes:
        record: What its session saw.
        prompt: Prompt ids without padding.
        said: Ids the batch generated for it, up to its end; after a trip, up to the trip.
        ids: Ids that stand behind the prompt.
        redirected: What a trip led to, or None.
    """

    record: RowRecord
    prompt: tuple[int, ...]
    said: tuple[int, ...]
    ids: tuple[int, ...]
    redirected: Redirected | None


def outcome_of(
    record: RowRecord,
    *,
    row: int,
    prompt: Sequence[int],
    prefill_tokens: int,
    said: Sequence[int],
    rewinder: Rewinder,
) -> Outcome:
    """Redirect a row if it tripped, and say what stands.

    Args:
        record: What its session saw.
        row: Its index in the batch.
        prompt: Its prompt ids without padding.
        prefill_tokens: Trailing ids of the prompt that are supplied prefill.
        said: Its generated ids, up to its end.
        rewinder: Of the call.
    """
    if record.trip is None:
        return Outcome(record, tuple(prompt), tuple(said), tuple(said), None)
    own = tuple(said[: record.trip.cut.kept + record.trip.cut.dropped])
    redirected = rewinder.redirect(
        record.trip, row=row, prompt=prompt, prefill_tokens=prefill_tokens, said=own
    )
    return Outcome(record, tuple(prompt), own, redirected.ids, redirected)


def void_reason(
    certificate: Certificate, settings: CallSettings, *, is_chat: bool
) -> str | None:
    """Say why a call lies outside what was certified; None if it does not.

    A shorter cap lies inside: the maximum over fewer tokens is no larger.
    """
    envelope = certificate.envelope
    if not is_chat:
        return "a raw completion has no assistant turn, and responses of chats were certified"
    if settings.max_new_tokens > envelope.max_new_tokens:
        return f"max_new_tokens={settings.max_new_tokens} is above {envelope.max_new_tokens}"
    names = ("do_sample", "temperature", "top_p", "top_k")
    for name in names if envelope.do_sample and settings.do_sample else names[:1]:
        value, wanted = getattr(settings, name), getattr(envelope, name)
        if value != wanted:
            return f"{name}={value} is not {wanted}"
    return None


def trace_of(outcome: Outcome) -> SafetyTrace:
    return SafetyTrace(outcome)
