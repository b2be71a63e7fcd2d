"""What is asked of an engine for one row, and what it answers, as plain values.

Knows prompts as ids, sampling, policies and events. Does not know models, queues or HTTP.
Texts in events are released text: nothing in a `Said` may be taken back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from safe_decode.decision import Outcome, Redirect
from safe_decode.trace.schema import SafetyTrace

__all__ = [
    "Event",
    "FinishReason",
    "Finished",
    "Row",
    "RowPolicy",
    "RowPrompt",
    "RowRequest",
    "Said",
    "Sampling",
    "TokenNote",
    "RowTripped",
]

FinishReason = Literal["stop", "length", "content_filter", "cancelled"]
"""stop: an end id or a stop string. length: the cap. content_filter: the row tripped, or its
guard or engine failed. cancelled: the reader left."""


@dataclass(frozen=True, slots=True)
class RowPrompt:
    """A prompt as ids.

    Attributes:
        ids: The supplied beginning of the answer last.
        scanned: Trailing positions that are judged before the first token.
        prefill_tokens: Trailing ids that are a supplied beginning of the answer.
        is_chat: Whether there is an open assistant turn.
    """

    ids: tuple[int, ...]
    scanned: int
    prefill_tokens: int
    is_chat: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's tokens are chosen. Depends on nothing but the row.

    Attributes:
        max_tokens: The cap, at least 1.
        seed: Of the row's own draws.
        temperature: 0: greedy.
        top_p: Mass that is kept, in (0, 1].
        top_k: Candidates that are kept; 0: all.
        presence_penalty: Subtracted from what was said already.
        frequency_penalty: Subtracted for each time it was said.
        logit_bias: Added, by id.
        stop: Strings that end the row; not shown.
        top_logprobs: Alternatives reported for each token; None: no log-probabilities.
    """

    max_tokens: int
    seed: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class RowPolicy:
    """How a row is guarded.

    Attributes:
        alpha: Level of the certificate whose threshold is used.
        redirect: What a tripped row emits.
        holdback_tokens: A token is shown when it and this many after it are judged.
    """

    alpha: float
    redirect: Redirect
    holdback_tokens: int


@dataclass(frozen=True, slots=True)
class RowRequest:
    """All that an engine needs to know of a row."""

    prompt: RowPrompt
    sampling: Sampling
    policy: RowPolicy


@dataclass(frozen=True, slots=True)
class TokenNote:
    """One token that is shown.

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
class Said:
    """Text for the reader.

    Attributes:
        text: To be appended.
        tokens: What it consists of.
        by: "model": its own words before any trip. "redirect": what follows a trip, the
            guard's words and, after a rewind, the model's under the guard.
    """

    text: str
    tokens: tuple[TokenNote, ...]
    by: Literal["model", "redirect"] = "model"


@dataclass(frozen=True, slots=True)
class RowTripped:
    """The row has tripped; what was shown stands.

    Attributes:
        redirect: What follows.
        statistic: That crossed the threshold; None if the guard failed.
        dropped: Tokens that were written and will not be shown. For operators only.
        error: Name of what failed, or None for an alarm.
    """

    redirect: Redirect
    statistic: float | None
    dropped: tuple[TokenNote, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The row's last event.

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


Event = Said | RowTripped | Finished


class Row:
    """A row on its way through an engine.

    Args:
        request: What is asked.
        emit: Takes its events, from any thread.

    Attributes:
        is_finished: Whether its last event was emitted.
        trace: What happened, once its whole run has ended and if the engine keeps traces.
    """

    def __init__(self, request: RowRequest, emit: Callable[[Event], None]) -> None:
        self.request = request
        self.is_finished = False
        self.trace: SafetyTrace | None = None
        self._emit, self._cancelled = emit, threading.Event()

    @property
    def is_cancelled(self) -> bool:
        """Say whether its reader has left."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Let the row end at its next token; its neighbours go on."""
        self._cancelled.set()

    def emit(self, event: Event) -> None:
        """Hand an event to the reader; nothing follows a `Finished`."""
        if self.is_finished:
            return
        self.is_finished = isinstance(event, Finished)
        self._emit(event)
