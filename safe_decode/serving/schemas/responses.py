"""Responses in the shape of OpenAI's responses endpoint: whole, and as the events of a stream.

Knows the fields of a response, and ours among them: a `safety` object. A trip ends with the
status `incomplete` and the reason `content_filter`. Its refusal follows in the same text, since
clients show parts one behind the other; without `refusal_as_content` it is a part of its own.
Does not know HTTP, queues or the guard.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from safe_decode.serving.scheduling.response import ResponseState
from safe_decode.serving.schemas.responses_request import ResponsesRequest
from safe_decode.streaming.events import Finished, GuardText, Released, RowEvent

__all__ = ["ResponsesFormatter"]

NamedEvent = tuple[str, dict[str, Any]]

_REASONS = {"content_filter": "content_filter", "length": "max_output_tokens"}
_NOBODY = {
    **dict.fromkeys(("error", "metadata", "previous_response_id", "prompt", "user")),
    **{"background": False, "parallel_tool_calls": False, "store": False, "tools": []},
    **{"tool_choice": "none", "truncation": "disabled", "top_logprobs": 0},
}
"""Fields of a response that are the same in each."""


@dataclass
class ResponsesFormatter:
    """One response.

    Attributes:
        model: Its name.
        ask: What was asked, of which a response repeats some.
        id: Of the response.
        item: Of its one message.
        created: Unix time.
    """

    model: str
    ask: ResponsesRequest
    id: str = field(default_factory=lambda: f"resp_{uuid4().hex}")
    item: str = field(default_factory=lambda: f"msg_{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    _events: int = 0
    _refuses: bool = False

    def whole(self, story: ResponseState) -> dict[str, Any]:
        """Write a finished response."""
        reason = _REASONS.get(story.finish_reason)
        shown, prompt = story.shown_tokens, story.prompt_tokens
        return {
            **self._head("completed" if reason is None else "incomplete", story),
            "incomplete_details": None if reason is None else {"reason": reason},
            "output": [self._message(story)],
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": shown,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + shown,
            },
            "safety": {**story.safety(), "refusal": story.refusal or None},
        }

    def opening(self, story: ResponseState) -> Iterator[NamedEvent]:
        """Write the events that open a stream."""
        begun = {
            **self._head("in_progress", story),
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }
        yield self._event("response.created", {"response": begun})
        yield self._event("response.in_progress", {"response": begun})
        item = {**self._item("in_progress"), "content": []}
        yield self._event("response.output_item.added", {"output_index": 0, "item": item})
        yield self._part("added", 0, _text_part(""))

    def events(self, story: ResponseState, event: RowEvent) -> Iterator[NamedEvent]:
        """Write the events of an event that `story` has taken."""
        if isinstance(event, Released | GuardText):
            if story.shown_as_content(event):
                yield self._piece("output_text.delta", 0, {"delta": event.text, "logprobs": []})
                return
            if not self._refuses:
                self._refuses = True
                part = {"type": "refusal", "refusal": ""}
                yield self._part("added", 1, part)
            yield self._piece("refusal.delta", 1, {"delta": event.text})
        elif isinstance(event, Finished):
            yield from self._end(story)

    def _end(self, story: ResponseState) -> Iterator[NamedEvent]:
        parts = self._parts(story)
        yield self._piece("output_text.done", 0, {"text": story.content, "logprobs": []})
        yield self._part("done", 0, parts[0])
        for part in parts[1:]:
            yield self._piece("refusal.done", 1, {"refusal": part["refusal"]})
            yield self._part("done", 1, part)
        whole = self.whole(story)
        (item,) = whole["output"]
        yield self._event("response.output_item.done", {"output_index": 0, "item": item})
        yield self._event(f"response.{whole['status']}", {"response": whole})

    def _head(self, status: str, story: ResponseState) -> dict[str, Any]:
        ask, sampling = self.ask, story.request.sampling
        form = ask.text.format if ask.text is not None else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": status,
            **_NOBODY,
            "metadata": {},
            "instructions": ask.instructions,
            "max_output_tokens": ask.max_output_tokens,
            "reasoning": {"effort": ask.reasoning and ask.reasoning.effort, "summary": None},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "text": {"format": {"type": "text" if form is None else form.type}},
        }

    def _message(self, story: ResponseState) -> dict[str, Any]:
        is_whole = story.finish_reason == "stop"
        item = self._item("completed" if is_whole else "incomplete")
        return {**item, "content": self._parts(story)}

    def _parts(self, story: ResponseState) -> list[dict[str, Any]]:
        parts = [_text_part(story.content)]
        if story.refusal and not story.content.endswith(story.refusal):
            parts.append({"type": "refusal", "refusal": story.refusal})
        return parts

    def _item(self, status: str) -> dict[str, Any]:
        return {"id": self.item, "type": "message", "role": "assistant", "status": status}

    def _part(self, kind: str, index: int, part: dict[str, Any]) -> NamedEvent:
        return self._event(f"response.content_part.{kind}", {**self._place(index), "part": part})

    def _piece(self, kind: str, index: int, told: dict[str, Any]) -> NamedEvent:
        return self._event(f"response.{kind}", {**self._place(index), **told})

    def _place(self, index: int) -> dict[str, Any]:
        return {"item_id": self.item, "output_index": 0, "content_index": index}

    def _event(self, kind: str, told: dict[str, Any]) -> NamedEvent:
        number, self._events = self._events, self._events + 1
        return kind, {"type": kind, "sequence_number": number, **told}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
