"""The events of one upstream stream in Anthropic's shape, held back by ids and believed by mark.

Knows named events, counts of ids and how a message ends. Does not know HTTP. A message is one
block of text: blocks of thinking and of tools, and their deltas, close the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

from safe_decode.serving.proxy.choices import End
from safe_decode.serving.proxy.fields import (
    TURNED,
    count_of,
    ids_of,
    object_of,
    parsed,
    safety_of,
    text_of,
    word_of,
)
from safe_decode.serving.proxy.hold import Hold
from safe_decode.serving.proxy.requests import ProxiedAsk
from safe_decode.serving.schemas.notice import WITHHELD

__all__ = ["MessageRelay", "message_end", "message_head"]

NamedEvent = dict[str, Any]

_STOPS = ("end_turn", "max_tokens", "stop_sequence", "refusal")
_MAX_REFUSAL = 65_536


class MessageRelay:
    """Passes one message on.

    Args:
        ask: What the reader asked for.
        bundle: The mark of the guard that is expected.
        holdback_tokens: A delta is passed on when this many ids came after it.

    Attributes:
        ends: How the message has ended, once it has.
    """

    def __init__(self, ask: ProxiedAsk, *, bundle: str, holdback_tokens: int) -> None:
        self.ends: list[End] = []
        self._ask, self._bundle = ask, bundle
        self._hold: Hold[NamedEvent] = Hold(holdback_tokens)
        self._input_tokens = 0
        self._opened: list[str] = []
        self._has_turned = self._has_stopped = self._is_withheld = False

    @property
    def is_over(self) -> bool:
        """Whether nothing that follows is of interest."""
        return bool(self.ends)

    def take(self, data: bytes) -> Iterator[NamedEvent]:
        """Take one event; yield what may be passed on.

        Raises:
            ValueError: It is no event of a message, is out of place, speaks of tokens without
                their ids, or ends without the mark of the guard.
        """
        if self.is_over:
            return
        event = parsed(data)
        kind = event.get("type")
        if kind == "ping":
            yield {"type": "ping"}
        elif kind == "message_start" and not self._opened:
            yield from self._start(object_of(event.get("message")))
        elif kind == "content_block_start" and self._opened == ["message_start"]:
            yield from self._start_block(event)
        elif kind == "content_block_delta" and self._is_speaking:
            yield from self._delta(event)
        elif kind == "content_block_stop" and self._is_speaking:
            _require_first(event)
            self._has_stopped = True
        elif kind == "message_delta" and self._has_stopped:
            yield from self._take_end(event)
        else:
            raise ValueError("an event is unknown or out of place")

    def close(self, safety: Mapping[str, Any]) -> Iterator[NamedEvent]:
        """End what the upstream did not end; what waits is dropped.

        Args:
            safety: What the last event says.
        """
        if not self.ends:
            self._hold.clear()
            yield from self._openers()
            yield from self._end(End("refusal", safety, has_turned=True), None)

    @property
    def _is_speaking(self) -> bool:
        return len(self._opened) == 2 and not self._has_stopped

    def _start(self, message: Mapping[str, Any]) -> Iterator[NamedEvent]:
        if message.get("content"):
            raise ValueError("an opening event speaks")
        usage = object_of(message.get("usage"))
        self._input_tokens = count_of(usage.get("input_tokens", 0))
        yield from self._open("message_start")

    def _start_block(self, event: Mapping[str, Any]) -> Iterator[NamedEvent]:
        _require_first(event)
        block = object_of(event.get("content_block"))
        word_of(block.get("type"), ("text",))
        if block.get("text"):
            raise ValueError("an opening event speaks")
        yield from self._open("content_block_start")

    def _openers(self) -> Iterator[NamedEvent]:
        for kind in ("message_start", "content_block_start"):
            if kind not in self._opened:
                yield from self._open(kind)

    def _open(self, kind: str) -> Iterator[NamedEvent]:
        self._opened.append(kind)
        if kind == "message_start":
            message = {
                **message_head(self._ask),
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": self._input_tokens, "output_tokens": 0},
            }
            yield {"type": kind, "message": message}
        else:
            yield {"type": kind, "index": 0, "content_block": {"type": "text", "text": ""}}

    def _delta(self, event: Mapping[str, Any]) -> Iterator[NamedEvent]:
        _require_first(event)
        delta, safety = object_of(event.get("delta")), object_of(event.get("safety"))
        word_of(delta.get("type"), ("text_delta",))
        ids = ids_of(event.get("token_ids"))
        is_redirect = safety.get("by") == "redirect"
        is_notice = not ids and is_redirect and delta.get("text") == WITHHELD
        # The sentence is known, so it needs no ids; it is written once the end is marked.
        self._is_withheld |= is_notice
        text = "" if is_notice else text_of(delta.get("text"), n_ids=len(ids))
        if is_redirect and not self._has_turned:
            self._has_turned = True
            self._hold.clear()  # what tripped within our own hold-back is not shown
        if self._has_turned and not is_redirect:
            raise ValueError("the model speaks on after its trip")
        if not ids:
            return
        told: NamedEvent = {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": text},
        }
        if is_redirect:
            told["safety"] = {"by": "redirect"}
        if self._ask.keeps_ids:
            told["token_ids"] = list(ids)
        yield from self._hold.push(len(ids), told)

    def _take_end(self, event: Mapping[str, Any]) -> Iterator[NamedEvent]:
        delta = object_of(event.get("delta"))
        end, stop = message_end({**delta, "safety": event.get("safety")}, self._ask, self._bundle)
        if end.has_turned and not self._has_turned:
            self._hold.clear()
        yield from self._end(end, stop)

    def _end(self, end: End, stop: str | None) -> Iterator[NamedEvent]:
        yield from self._hold.rest()
        if self._is_withheld and end.has_turned and not self._hold.shown_tokens:
            yield {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": WITHHELD},
                "safety": {"by": "redirect"},
            }
        self.ends.append(end)
        yield {"type": "content_block_stop", "index": 0}
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": end.reason, "stop_sequence": stop},
            "usage": {
                "input_tokens": self._input_tokens,
                "output_tokens": self._hold.shown_tokens,
            },
            "safety": end.safety,
        }
        yield {"type": "message_stop"}


def message_head(ask: ProxiedAsk) -> dict[str, Any]:
    """Write what a message begins with; nothing of it is the upstream's."""
    return {
        "id": f"msg_{uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": ask.model,
    }


def message_end(told: Mapping[str, Any], ask: ProxiedAsk, bundle: str) -> tuple[End, str | None]:
    """Read how a message has ended, and by which stop string.

    Args:
        told: Has stop_reason, stop_sequence and safety.
        ask: Has the stop strings of the client.
        bundle: The mark of the guard that is expected.

    Raises:
        ValueError: The end is unknown, lacks the mark, or names a stop string of its own.
    """
    reason = word_of(told.get("stop_reason"), _STOPS)
    safety = safety_of(told.get("safety"), bundle)
    has_turned = reason == "refusal" or safety["action"] in TURNED
    if has_turned:
        refusal = text_of(object_of(told.get("safety")).get("refusal"))
        if len(refusal) > _MAX_REFUSAL:
            raise ValueError(f"a refusal of {len(refusal)} characters")
        safety["refusal"] = refusal or None
        return End("refusal", safety, has_turned=True), None
    stop = told.get("stop_sequence")
    if stop is not None:
        word_of(stop, ask.stops)
    return End(reason, safety, has_turned=False), stop


def _require_first(event: Mapping[str, Any]) -> None:
    if count_of(event.get("index")) != 0:
        raise ValueError("a message has more than one block")
