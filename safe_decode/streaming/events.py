"""What a stream tells its reader, in typed events.

Knows words, ids and texts of one row at a time. Does not know models, threads, or how a
token came to be released.

For each row: any number of `Released`; if it trips, one `Tripped`, then the guard's own
words as `GuardText`, after a rewind more `Released` and perhaps another `Tripped`; at last
one `Ended`. The texts of a row's `Released` and `GuardText`, joined, are the text that
`Ended` repeats and that `SafeDecoder.generate` returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safe_decode.decision import Redirect
from safe_decode.trace.schema import SafetyTrace

__all__ = ["Ended", "FinishReason", "GuardText", "Released", "StreamEvent", "Tripped"]

FinishReason = Literal["stop", "length", "content_filter", "cancelled"]
"""Why a row ended.

stop: by an end id, a stop string or a user's criterion; a rewound row that finished too.
length: the cap was reached.
content_filter: the row was refused, stopped or closed by the guard.
cancelled: `cancel()` was called, or the stream was left.
"""


@dataclass(frozen=True, slots=True)
class Released:
    """Tokens of the model that were judged and may be shown.

    Attributes:
        row: Index of the row.
        text: What they add to the text. Empty while a character is still incomplete: its
            text comes with the token that completes it.
        token_ids: Their ids; empty only where the row ends inside a character.
        attempt: 0 in the row's own run, 1.. in the continuations after a rewind.
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Tripped:
    """The row has tripped. What was released stands; nothing else of it will be shown.

    Attributes:
        row: Index of the row.
        redirect: What follows.
        kept_tokens: Tokens of this attempt that stand.
        dropped_tokens: Tokens of this attempt that were generated and are not shown.
        attempt: As in `Released`.
        error: Name and message of what failed, or None for an alarm.
    """

    row: int
    redirect: Redirect
    kept_tokens: int
    dropped_tokens: int
    attempt: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class GuardText:
    """Words of the guard, not of the model.

    Attributes:
        row: Index of the row.
        text: What is shown, a mark of the cut included.
        token_ids: Its ids.
        kind: "refusal": the canned text, after which the row ends. "opener": the first words
            of a rewound answer, which the model continues.
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    kind: Literal["refusal", "opener"]


@dataclass(frozen=True, slots=True)
class Ended:
    """The row's last event.

    Attributes:
        row: Index of the row.
        finish_reason: Why it ended.
        text: All that was shown.
        token_ids: All ids that were shown, guard's words included; without an end id.
        trace: What happened and why.
        stop_string: The stop string that ended the row, or None.
    """

    row: int
    finish_reason: FinishReason
    text: str
    token_ids: tuple[int, ...]
    trace: SafetyTrace
    stop_string: str | None = None


StreamEvent = Released | Tripped | GuardText | Ended
