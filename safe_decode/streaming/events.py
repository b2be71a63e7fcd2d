"""What a stream tells its reader, in typed events.

Knows words, ids and texts of one row at a time. Does not know models, threads, or how a
token came to be released.

For each row: any number of `Released`; if it trips, one `Tripped`, then the guard's own
words as `GuardText`, after a rewind more `Released` and perhaps another `Tripped`; at last
one `Ended`. The texts of a row's `Released` and `GuardText`, joined, are the text that
`Ended` repeats and that `SafeDecoder.generate` returns. Servers read the same events, but for
the last: theirs is `Finished`, which comes before the batch of the row has ended, and so before
its trace. Text that was released is never taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safe_decode.decision import Outcome, Redirect
from safe_decode.trace.schema import SafetyTrace

__all__ = [
    "Ended",
    "FinishReason",
    "Finished",
    "GuardText",
    "Released",
    "RowEvent",
    "StreamEvent",
    "TokenNote",
    "Tripped",
]

FinishReason = Literal["stop", "length", "content_filter", "cancelled"]
"""Why a row ended.

stop: by an end id, a stop string or a user's criterion; a rewound row that finished too.
length: the cap was reached.
content_filter: the row was refused, stopped or closed by the guard, or its engine failed.
cancelled: `cancel()` was called, or the reader has left.
"""


@dataclass(frozen=True, slots=True)
class TokenNote:
    """What is known of one token.

    Attributes:
        token: Its id.
        text: What it adds to the text; empty inside a character.
        statistic: Of the score that judged it; None where no score did, or after a trip.
        logprob: Of the bare distribution, natural logarithm; None unless asked for.
        top: The likeliest alternatives, with their log-probabilities.
    """

    token: int
    text: str
    statistic: float | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Released:
    """Tokens of the model that were judged and may be shown.

    Attributes:
        row: Index of the row.
        text: What they add to the text. Empty while a character is still incomplete: its
            text comes with the token that completes it.
        token_ids: Their ids; empty only where the row ends inside a character.
        attempt: 0 in the row's own run, 1.. in the continuations after a rewind.
        notes: One a token that is shown in whole or in part; empty where nobody asks for them.
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    attempt: int = 0
    notes: tuple[TokenNote, ...] = ()


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
        statistic: That crossed the threshold; None if the guard failed, or nobody asks for it.
        dropped: The tokens that are not shown; empty where nobody asks for them.
    """

    row: int
    redirect: Redirect
    kept_tokens: int
    dropped_tokens: int
    attempt: int = 0
    error: str | None = None
    statistic: float | None = None
    dropped: tuple[TokenNote, ...] = ()


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


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a row that an engine runs for a server.

    Attributes:
        reason: Why it ended.
        outcome: In one word; None if the row never ran or was cancelled.
        shown_tokens: Tokens that were shown, the guard's words included.
        dropped_tokens: Tokens that were written and not shown.
        trip_step: Score that tripped, or None. For operators only.
        void: Why the certificate does not speak of this row, or None.
        stop: The stop string that ended it, or None.
        error: What failed, or None. For operators only.
    """

    reason: FinishReason
    outcome: Outcome | None = None
    shown_tokens: int = 0
    dropped_tokens: int = 0
    trip_step: int | None = None
    void: str | None = None
    stop: str | None = None
    error: str | None = None


StreamEvent = Released | Tripped | GuardText | Ended
"""What the library's streams yield."""

RowEvent = Released | Tripped | GuardText | Finished
"""What an engine tells of a row."""
