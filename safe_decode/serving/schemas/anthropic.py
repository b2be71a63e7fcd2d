"""Responses in Anthropic's shape: whole, and as the events of a stream.

Knows the fields of messages, and ours among them: a `safety` object. A trip ends with
`stop_reason: "refusal"`. Does not know HTTP, queues or the guard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from safe_decode.serving.scheduling.response import ResponseState, is_before_trip, notes_of
from safe_decode.streaming.events import Finished, GuardText, Released, RowEvent, Tripped

__all__ = ["MessageFormatter"]

NamedEvent = tuple[str, dict[str, Any]]

_STOPS = {"content_filter": "refusal", "length": "max_tokens"}


@dataclass
class MessageFormatter:
    """One message.

    Attributes:
        model: Its name.
        gives_ids: Whether deltas carry the ids that are shown.
        id: Of the message.
    """

    model: str
    gives_ids: bool = False
    id: str = field(default_factory=lambda: f"msg_{uuid4().hex}")

    def whole(self, story: ResponseState) -> dict[str, Any]:
        """Write a finished message."""
        content = [{"type": "text", "text": story.content}] if story.content else []
        return {
            **self._head(story),
            "content": content,
            **self._stop(story),
            "usage": self._usage(story),
            "safety": self._safety(story),
        }

    def opening(self, story: ResponseState) -> Iterator[NamedEvent]:
        """Write the events that open a stream."""
        message = {
            **self._head(story),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": story.prompt_tokens, "output_tokens": 0},
        }
        yield "message_start", {"type": "message_start", "message": message}
        block = {"type": "text", "text": ""}
        yield (
            "content_block_start",
            {"type": "content_block_start", "index": 0, "content_block": block},
        )

    def events(self, story: ResponseState, event: RowEvent) -> Iterator[NamedEvent]:
        """Write the events of an event that `story` has taken."""
        if isinstance(event, Released | GuardText) and story.shown_as_content(event):
            delta: dict[str, Any] = {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": event.text},
            }
            tokens = story.exposure.tokens(notes_of(event), story.threshold)
            if tokens:
                delta["safety"] = {"tokens": tokens}
            if not is_before_trip(event):
                delta["safety"] = {**delta.get("safety", {}), "by": "redirect"}
            if self.gives_ids:
                delta["token_ids"] = list(event.token_ids)
            yield "content_block_delta", delta
        elif isinstance(event, Finished):
            yield "content_block_stop", {"type": "content_block_stop", "index": 0}
            delta = {
                "type": "message_delta",
                "delta": self._stop(story),
                "usage": self._usage(story),
                "safety": self._safety(story),
            }
            yield "message_delta", delta
            yield "message_stop", {"type": "message_stop"}
        else:
            assert isinstance(event, Released | GuardText | Tripped)

    def _head(self, story: ResponseState) -> dict[str, Any]:
        del story
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model}

    def _stop(self, story: ResponseState) -> dict[str, Any]:
        assert story.end is not None
        reason = _STOPS.get(story.finish_reason, "end_turn")
        if reason == "end_turn" and story.end.stop is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": story.end.stop}
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self, story: ResponseState) -> dict[str, int]:
        return {"input_tokens": story.prompt_tokens, "output_tokens": story.shown_tokens}

    def _safety(self, story: ResponseState) -> dict[str, Any]:
        return {**story.safety(), "refusal": story.refusal or None}
