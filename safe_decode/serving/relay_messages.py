"""The events of one upstream stream in Anthropic's shape, held back by ids and believed by mark.

Knows named events as dictionaries, counts of ids and how a message ends. Does not know HTTP.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["MessageRelay"]

NamedEvent = dict[str, Any]

_OPENING = ("message_start", "content_block_start", "ping")


class MessageRelay:
    """Passes one message on.

    Args:
        holdback_tokens: A delta is passed on when this many ids came after it.
        is_marked: Whether a safety object is of the expected guard.
        keeps_ids: Whether the reader asked for ids.

    Attributes:
        ends: The safety object and stop reason, once the message has ended.
    """

    def __init__(
        self, holdback_tokens: int, *, is_marked: Callable[[object], bool], keeps_ids: bool
    ) -> None:
        self.ends: list[tuple[Mapping[str, Any], str | None]] = []
        self._k, self._is_marked, self._keeps_ids = holdback_tokens, is_marked, keeps_ids
        self._held: deque[tuple[int, NamedEvent]] = deque()
        self._tokens = 0
        self._opened: set[str] = set()
        self._is_over = self._is_broken = self._has_stopped = False

    def take(self, data: bytes) -> Iterator[NamedEvent]:
        """Take one event; yield what may be passed on.

        Raises:
            ValueError: It is no event of a message, speaks of tokens without their ids, or ends
                without the mark of the guard.
        """
        if self._is_broken:
            return
        event = json.loads(data)
        kind = event.get("type") if isinstance(event, dict) else None
        if kind in _OPENING:
            if self._is_over or (kind != "ping" and kind in self._opened):
                raise ValueError("a message begins twice")
            if _says(event):
                raise ValueError("an opening event speaks")
            self._opened.add(str(kind))
            yield event
        elif kind == "content_block_delta" and not self._is_over:
            yield from self._delta(event)
        elif kind == "content_block_stop" and not self._is_over:
            # What is held comes before it, once the end says that it stands.
            self._held.append((0, event))
        elif kind == "message_delta" and not self._is_over:
            yield from self._end(event)
        elif kind == "message_stop" and self._is_over:
            self._has_stopped = True
            yield event
        else:
            raise ValueError(f"{kind} is out of place")

    def close(self, safety: Mapping[str, Any]) -> Iterator[NamedEvent]:
        """End what the upstream did not end; what it held is dropped.

        Args:
            safety: What the last event says.
        """
        self._is_broken = True
        if not self._is_over:
            self._held.clear()
            self.ends.append((safety, "refusal"))
            yield from self._openers()
            yield {"type": "content_block_stop", "index": 0}
            yield {
                "type": "message_delta",
                "delta": {"stop_reason": "refusal", "stop_sequence": None},
                "usage": {"output_tokens": 0},
                "safety": safety,
            }
        if not self._has_stopped:
            yield {"type": "message_stop"}

    def _openers(self) -> Iterator[NamedEvent]:
        if "message_start" not in self._opened:
            message: dict[str, Any] = {
                "id": "msg_closed",
                "type": "message",
                "role": "assistant",
                "model": "",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": 0, "output_tokens": 0},
            }
            yield {"type": "message_start", "message": message}
        if "content_block_start" not in self._opened:
            block = {"type": "text", "text": ""}
            yield {"type": "content_block_start", "index": 0, "content_block": block}

    def _delta(self, event: NamedEvent) -> Iterator[NamedEvent]:
        ids = event.get("token_ids") or []
        if not ids:
            raise ValueError("text without ids")
        if not self._keeps_ids:
            event = {name: value for name, value in event.items() if name != "token_ids"}
        safety = event.get("safety")
        if isinstance(safety, Mapping) and safety.get("by") == "redirect":
            self._held.clear()  # what tripped within our own hold-back is not shown
            self._tokens = 0
            yield event
            return
        self._held.append((len(ids), event))
        self._tokens += len(ids)
        while self._held and self._tokens - self._held[0][0] >= self._k:
            n_ids, passed = self._held.popleft()
            self._tokens -= n_ids
            yield passed

    def _end(self, event: NamedEvent) -> Iterator[NamedEvent]:
        safety, delta = event.get("safety"), event.get("delta")
        if not isinstance(safety, Mapping) or not self._is_marked(safety):
            raise ValueError("a message ends without the mark of its guard")
        reason = delta.get("stop_reason") if isinstance(delta, Mapping) else None
        turns = reason == "refusal"
        for _, held in self._held:
            if not turns or held["type"] == "content_block_stop":
                yield held
        self._held.clear()
        self._is_over = True
        self.ends.append((safety, reason))
        yield event


def _says(event: NamedEvent) -> bool:
    """Say whether an event that should only open a message has text."""
    message, block = event.get("message") or {}, event.get("content_block") or {}
    return bool(message.get("content") or block.get("text"))
