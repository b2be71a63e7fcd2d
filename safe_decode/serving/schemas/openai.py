"""Responses in OpenAI's shapes: whole, and as chunks of a stream.

Knows the fields of chat completions and of completions, and ours among them: `refusal`, and a
`safety` object in each choice. Does not know HTTP, queues or the guard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from safe_decode.serving.scheduling.response import ResponseState, is_before_trip, notes_of
from safe_decode.streaming.events import (
    Finished,
    GuardText,
    Released,
    RowEvent,
    TokenNote,
    Tripped,
)

__all__ = ["ChatFormatter", "CompletionFormatter", "ResponseFormatter", "usage_of"]

TokenText = Callable[[int], str]


@dataclass
class ResponseFormatter:
    """What the objects of one response have in common.

    Attributes:
        model: Its name.
        fingerprint: Of the bundle.
        token_text: From an id to its text.
        gives_ids: Whether chunks and choices carry the ids that are shown.
        id: Of the response.
        created: Unix time.
    """

    model: str
    fingerprint: str
    token_text: TokenText
    gives_ids: bool = False
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    prefix = "cmpl-"
    name = "text_completion"
    chunk_name = "text_completion"

    def whole(self, stories: Sequence[ResponseState]) -> dict[str, Any]:
        """Write a finished response."""
        choices = [self.choice(index, story) for index, story in enumerate(stories)]
        return {**self.head(self.name), "choices": choices, "usage": usage_of(stories)}

    def head(self, name: str) -> dict[str, Any]:
        """Write what every object begins with."""
        return {
            "id": self.prefix + self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def chunks(self, index: int, story: ResponseState, event: RowEvent) -> list[dict[str, Any]]:
        """Write the chunks of an event that `story` has taken."""
        if isinstance(event, Released | GuardText):
            ids = {"token_ids": list(event.token_ids)} if self.gives_ids else {}
            choices = [{**self.said(story, event), **ids}]
        elif isinstance(event, Tripped):
            told = story.trip_told()
            choices = [] if told is None else [{**self.empty(), "safety": {"trip": told}}]
        else:
            choices = [self.last(story, event)]
        return [
            {**self.head(self.chunk_name), "choices": [{"index": index, **choice}]}
            for choice in choices
        ]

    def usage_chunk(self, stories: Sequence[ResponseState]) -> dict[str, Any]:
        """Write the chunk that counts."""
        return {**self.head(self.chunk_name), "choices": [], "usage": usage_of(stories)}

    def first(self, index: int) -> dict[str, Any] | None:
        """Write the chunk that opens a choice, where the shape has one."""
        del index
        return None

    def choice(self, index: int, story: ResponseState) -> dict[str, Any]:
        """Write a finished choice."""
        raise NotImplementedError

    def said(self, story: ResponseState, said: Released | GuardText) -> dict[str, Any]:
        """Write what a chunk's choice says, without its index."""
        raise NotImplementedError

    def empty(self) -> dict[str, Any]:
        """Write a choice that says nothing, without its index."""
        raise NotImplementedError

    def last(self, story: ResponseState, end: Finished) -> dict[str, Any]:
        """Write the last choice, without its index."""
        del end
        return {
            **self.empty(),
            "finish_reason": story.finish_reason,
            "safety": story.safety(),
        }


class ChatFormatter(ResponseFormatter):
    """Chat completions."""

    prefix = "chatcmpl-"
    name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def first(self, index: int) -> dict[str, Any]:
        """Write the chunk that names the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self.head(self.chunk_name), "choices": [choice]}

    def choice(self, index: int, story: ResponseState) -> dict[str, Any]:
        """Write a message."""
        return {
            "index": index,
            "message": {
                "role": "assistant",
                "content": story.content,
                "refusal": story.refusal or None,
            },
            "logprobs": self._logprobs(story, story.notes),
            "finish_reason": story.finish_reason,
            "safety": story.safety(),
        }

    def said(self, story: ResponseState, said: Released | GuardText) -> dict[str, Any]:
        """Write a delta: content before a trip, refusal after it."""
        delta: dict[str, Any] = {}
        if story.shown_as_content(said):
            delta["content"] = said.text
        if not is_before_trip(said):
            delta["refusal"] = said.text
        choice: dict[str, Any] = {"delta": delta, "logprobs": None, "finish_reason": None}
        if is_before_trip(said):
            choice["logprobs"] = self._logprobs(story, notes_of(said))
        tokens = story.exposure.tokens(notes_of(said), story.threshold)
        return {**choice, "safety": {"tokens": tokens}} if tokens else choice

    def empty(self) -> dict[str, Any]:
        """Write a delta that says nothing."""
        return {"delta": {}, "logprobs": None, "finish_reason": None}

    def _logprobs(self, story: ResponseState, notes: Sequence[TokenNote]) -> dict[str, Any] | None:
        if story.request.sampling.top_logprobs is None:
            return None
        content = [
            {
                **self._token(note.token, note.logprob, note.text),
                "top_logprobs": [self._token(token, value) for token, value in note.top],
            }
            for note in notes
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None, text: str | None = None) -> dict[str, Any]:
        told = self.token_text(token) if text is None else text
        return {"token": told, "logprob": logprob, "bytes": list(told.encode())}


class CompletionFormatter(ResponseFormatter):
    """Completions of raw text."""

    def choice(self, index: int, story: ResponseState) -> dict[str, Any]:
        """Write a text."""
        return {
            "index": index,
            "text": story.content,
            "refusal": story.refusal or None,
            "logprobs": self._logprobs(story, story.notes, 0),
            "finish_reason": story.finish_reason,
            "safety": story.safety(),
        }

    def said(self, story: ResponseState, said: Released | GuardText) -> dict[str, Any]:
        """Write a piece of text."""
        shown = said.text if story.shown_as_content(said) else ""
        choice: dict[str, Any] = {"text": shown, "logprobs": None, "finish_reason": None}
        if not is_before_trip(said):
            return {**choice, "refusal": said.text}
        start = len(story.content) - len(said.text)
        tokens = story.exposure.tokens(notes_of(said), story.threshold)
        choice["logprobs"] = self._logprobs(story, notes_of(said), start)
        return {**choice, "safety": {"tokens": tokens}} if tokens else choice

    def empty(self) -> dict[str, Any]:
        """Write no text."""
        return {"text": "", "logprobs": None, "finish_reason": None}

    def _logprobs(
        self, story: ResponseState, notes: Sequence[TokenNote], start: int
    ) -> dict[str, Any] | None:
        if story.request.sampling.top_logprobs is None:
            return None
        offsets = []
        for note in notes:
            offsets.append(start)
            start += len(note.text)
        return {
            "tokens": [note.text for note in notes],
            "token_logprobs": [note.logprob for note in notes],
            "top_logprobs": [
                {self.token_text(token): value for token, value in note.top} for note in notes
            ],
            "text_offset": offsets,
        }


def usage_of(stories: Sequence[ResponseState]) -> dict[str, int]:
    """Count tokens; one prompt counts once however many answers it has."""
    prompts = {id(story.request.prompt): story.prompt_tokens for story in stories}
    prompt, shown = sum(prompts.values()), sum(story.shown_tokens for story in stories)
    return {"prompt_tokens": prompt, "completion_tokens": shown, "total_tokens": prompt + shown}
