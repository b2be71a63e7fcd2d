"""The chunks of one upstream stream: held back by token ids, believed only with their mark.

Knows chunks as dictionaries, counts of ids and ends of choices. Does not know HTTP.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Relay"]

Chunk = dict[str, Any]


@dataclass
class _Held:
    """What waits of one choice.

    Attributes:
        chunks: In order, each with the number of its ids.
        tokens: Ids in them.
        has_ended: Whether its last chunk came, marked.
    """

    chunks: deque[tuple[int, Chunk]] = field(default_factory=deque)
    tokens: int = 0
    has_ended: bool = False


class Relay:
    """Passes one stream on.

    Args:
        holdback_tokens: A chunk is passed on when this many ids came after it.
        is_marked: Whether a safety object is of the expected guard.
        keeps_ids: Whether the reader asked for ids.

    Attributes:
        ends: The safety object and finish reason of each choice that has ended.
    """

    def __init__(
        self, holdback_tokens: int, *, is_marked: Callable[[object], bool], keeps_ids: bool
    ) -> None:
        self.ends: list[tuple[Mapping[str, Any], str | None]] = []
        self._k, self._is_marked, self._keeps_ids = holdback_tokens, is_marked, keeps_ids
        self._held: dict[int, _Held] = {}
        self._head: Chunk = {}
        self._is_broken = False

    def take(self, data: bytes) -> Iterator[Chunk]:
        """Take one event; yield what may be passed on.

        Raises:
            ValueError: It is no chunk, or speaks of tokens without their ids.
        """
        if data == b"[DONE]" or self._is_broken:
            return
        chunk = json.loads(data)
        if not isinstance(chunk, dict) or "error" in chunk:
            raise ValueError("no chunk")
        self._head = {name: value for name, value in chunk.items() if name != "choices"}
        choices = chunk.get("choices") or []
        if not choices:
            yield chunk  # usage
        for choice in choices:
            yield from self._take(chunk, choice)

    def close(self, safety: Mapping[str, Any]) -> Iterator[Chunk]:
        """End what the upstream did not end; what it held is dropped.

        Args:
            safety: What the last chunks say.
        """
        self._is_broken = True
        for index, held in self._held.items() or [(0, _Held())]:
            if not held.has_ended:
                held.chunks.clear()
                choice = {"index": index, "delta": {}, "finish_reason": "content_filter"}
                self.ends.append((safety, "content_filter"))
                yield {**self._head, "choices": [{**choice, "safety": safety}]}

    def _take(self, chunk: Chunk, choice: Chunk) -> Iterator[Chunk]:
        held = self._held.setdefault(int(choice.get("index", 0)), _Held())
        if held.has_ended:
            raise ValueError("a choice goes on after its end")
        ids = choice.get("token_ids") or []
        delta = choice.get("delta") or {}
        says = choice.get("text") or delta.get("content") or delta.get("refusal")
        if says and not ids:
            raise ValueError("text without ids")
        if not self._keeps_ids:
            choice = {name: value for name, value in choice.items() if name != "token_ids"}
        one = {**chunk, "choices": [choice]}
        reason = choice.get("finish_reason")
        turns = reason == "content_filter" or delta.get("refusal") or choice.get("refusal")
        if reason is not None and not self._is_marked(choice.get("safety")):
            raise ValueError("a choice ends without the mark of its guard")
        if turns:
            held.chunks.clear()  # what tripped within our own hold-back is not shown
            held.tokens = 0
            yield one
        else:
            held.chunks.append((len(ids), one))
            held.tokens += len(ids)
            yield from self._released(held, at_end=reason is not None)
        if reason is not None:
            held.has_ended = True
            self.ends.append((choice["safety"], reason))

    def _released(self, held: _Held, *, at_end: bool) -> Iterator[Chunk]:
        while held.chunks:
            n_ids, chunk = held.chunks[0]
            if not at_end and held.tokens - n_ids < self._k:
                return
            held.chunks.popleft()
            held.tokens -= n_ids
            yield chunk
