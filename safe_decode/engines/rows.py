"""What is asked of an engine for one row, as plain values.

Knows prompts as ids, sampling and policies; what an engine answers is in `streaming.events`.
Does not know models, queues or HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from safe_decode.decision import Redirect
from safe_decode.streaming.events import Finished, RowEvent
from safe_decode.trace.schema import SafetyTrace

__all__ = [
    "Adjustment",
    "Row",
    "RowPolicy",
    "RowPrompt",
    "RowRequest",
    "Sampling",
]


@dataclass(frozen=True, slots=True)
class RowPrompt:
    """A prompt as ids.

    Attributes:
        ids: The supplied beginning of the answer last.
        scanned: Trailing positions that are judged before the first token.
        prefill_tokens: Trailing ids that are a supplied beginning of the answer.
        is_chat: Whether there is an open assistant turn.
        variables: What a request set of the template's own variables.
    """

    ids: tuple[int, ...]
    scanned: int
    prefill_tokens: int
    is_chat: bool
    variables: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's tokens are chosen. Depends on nothing but the row.

    Attributes:
        max_tokens: The cap, at least 1.
        seed: Of the row's own draws.
        temperature: 0: greedy.
        top_p: Mass that is kept, in (0, 1].
        top_k: Candidates that are kept; 0: all.
        min_p: Candidates less likely than this share of the likeliest are dropped; 0: none.
        repetition_penalty: Divides the positive and multiplies the negative scores of what stands
            in the prompt or was said; None: as the model's own configuration has it.
        min_tokens: The model cannot end before it has said so many.
        ignore_eos: The model cannot end at all; the cap ends it.
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
    min_p: float = 0.0
    repetition_penalty: float | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
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
class Adjustment:
    """One thing in which a row is served otherwise than its request asked.

    Attributes:
        param: The field that asked.
        asked: Its value.
        served: The value in effect.
        why: In words.
    """

    param: str
    asked: float
    served: float
    why: str


@dataclass(frozen=True, slots=True)
class RowRequest:
    """All that an engine needs to know of a row.

    Attributes:
        prompt: As ids.
        sampling: How its tokens are chosen.
        policy: How it is guarded.
        is_structured: The answer is read as data, so no words of others may stand in it.
        changes: In what it is served otherwise than was asked; its reader is told.
    """

    prompt: RowPrompt
    sampling: Sampling
    policy: RowPolicy
    is_structured: bool = False
    changes: tuple[Adjustment, ...] = ()


class Row:
    """A row on its way through an engine.

    Args:
        request: What is asked.
        emit: Takes its events, from any thread.

    Attributes:
        is_finished: Whether its last event was emitted.
        trace: What happened, once its whole run has ended and if the engine keeps traces.
    """

    def __init__(self, request: RowRequest, emit: Callable[[RowEvent], None]) -> None:
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

    def emit(self, event: RowEvent) -> None:
        """Hand an event to the reader; nothing follows a `Finished`."""
        if self.is_finished:
            return
        self.is_finished = isinstance(event, Finished)
        self._emit(event)
