"""The chunks of one upstream stream: held back by token ids, believed only with their mark.

Knows chunks, ends of choices and what waits of each. Does not know HTTP. No object of the
upstream is passed on: each chunk is written anew from the fields that are known.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from safe_decode.serving.proxy.choices import End, Piece, end_of, piece_of, written
from safe_decode.serving.proxy.fields import count_of, list_of, object_of, parsed
from safe_decode.serving.proxy.hold import Hold
from safe_decode.serving.proxy.requests import CHAT, ProxiedAsk
from safe_decode.serving.schemas.notice import WITHHELD

__all__ = ["Relay", "head_of"]

Chunk = dict[str, Any]


@dataclass
class _Choice:
    """What is known of one choice.

    Attributes:
        hold: What waits of it.
        is_open: Whether its first chunk was sent.
        has_turned: Whether it tripped.
        is_withheld: Whether the upstream says that nothing of it is shown.
        end: Once it has ended.
    """

    hold: Hold[Piece]
    is_open: bool = False
    has_turned: bool = False
    is_withheld: bool = False
    end: End | None = None


class Relay:
    """Passes one stream on.

    Args:
        ask: What the reader asked for.
        bundle: The mark of the guard that is expected.
        holdback_tokens: A piece is passed on when this many ids came after it.

    Attributes:
        ends: How each choice has ended, in the order of the ends.
    """

    def __init__(self, ask: ProxiedAsk, *, bundle: str, holdback_tokens: int) -> None:
        self.ends: list[End] = []
        self._ask, self._bundle = ask, bundle
        self._head = head_of(ask, bundle)
        self._choices = [_Choice(Hold(holdback_tokens)) for _ in range(ask.n_choices)]
        self._prompt_tokens: int | None = None
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether nothing that follows is of interest."""
        waits = self._ask.counts_usage and self._prompt_tokens is None
        return self._is_over or (not waits and all(c.end is not None for c in self._choices))

    def take(self, data: bytes) -> Iterator[Chunk]:
        """Take one event; yield what may be passed on.

        Raises:
            ValueError: It is no chunk, speaks without ids, or ends a choice without its mark.
        """
        if self._is_over:
            return
        if data == b"[DONE]":
            self._is_over = True
            return
        chunk = parsed(data)
        if chunk.get("error") is not None:
            raise ValueError("the upstream reports an error")
        for value in list_of(chunk.get("choices"), most=len(self._choices)):
            yield from self._take(object_of(value))
        if self._ask.counts_usage and chunk.get("usage") is not None:
            self._prompt_tokens = count_of(object_of(chunk["usage"]).get("prompt_tokens"))

    def close(self, safety: Mapping[str, Any]) -> Iterator[Chunk]:
        """End what the upstream did not end; what waits of it is dropped.

        Args:
            safety: What the last chunks say.
        """
        self._is_over = True
        for index, choice in enumerate(self._choices):
            if choice.end is None:
                choice.hold.clear()
                end = End("content_filter", safety, has_turned=True)
                yield from self._open(index, choice)
                yield from self._end(index, choice, end)
        if self._ask.counts_usage and self._prompt_tokens is not None:
            shown = sum(choice.hold.shown_tokens for choice in self._choices)
            usage = {
                "prompt_tokens": self._prompt_tokens,
                "completion_tokens": shown,
                "total_tokens": self._prompt_tokens + shown,
            }
            yield {**self._head, "choices": [], "usage": usage}

    def _take(self, value: Chunk) -> Iterator[Chunk]:
        index = count_of(value.get("index"))
        if index >= len(self._choices):
            raise ValueError(f"choice {index} was not asked for")
        choice = self._choices[index]
        if choice.end is not None:
            raise ValueError("a choice goes on after its end")
        piece, end = piece_of(value, self._ask, is_whole=False), end_of(value, self._bundle)
        yield from self._open(index, choice)
        turns = piece.tells_trip or (end is not None and end.has_turned)
        if turns and not choice.has_turned:
            choice.has_turned = True
            choice.hold.clear()  # what tripped within our own hold-back is not shown
        choice.is_withheld |= piece.is_withheld
        if choice.has_turned and not piece.is_redirect:
            if not turns and (piece.content or piece.ids):
                raise ValueError("the model speaks on after its trip")
            piece = Piece()
        if piece.ids:  # without ids there is no text
            for passed in choice.hold.push(len(piece.ids), piece):
                yield self._chunk(index, passed)
        if end is not None:
            yield from self._end(index, choice, end)

    def _open(self, index: int, choice: _Choice) -> Iterator[Chunk]:
        if self._ask.path == CHAT and not choice.is_open:
            delta = {"role": "assistant", "content": "", "refusal": None}
            first = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._with([first])
        choice.is_open = True

    def _end(self, index: int, choice: _Choice, end: End) -> Iterator[Chunk]:
        for passed in choice.hold.rest():
            yield self._chunk(index, passed)
        if choice.is_withheld and end.has_turned and not choice.hold.shown_tokens:
            form = self._ask.body.get("response_format") or {"type": "text"}
            is_data = form["type"] != "text"
            yield self._chunk(index, Piece("" if is_data else WITHHELD, WITHHELD))
        choice.end = end
        self.ends.append(end)
        yield self._chunk(index, Piece(), end)

    def _chunk(self, index: int, piece: Piece, end: End | None = None) -> Chunk:
        return self._with([written(index, piece, self._ask, is_whole=False, end=end)])

    def _with(self, choices: list[Chunk]) -> Chunk:
        usage = {"usage": None} if self._ask.counts_usage else {}
        return {**self._head, "choices": choices, **usage}


def head_of(ask: ProxiedAsk, bundle: str) -> Chunk:
    """Write what every object of an answer begins with; nothing of it is the upstream's."""
    is_chat = ask.path == CHAT
    name = "text_completion"
    if is_chat:
        name = "chat.completion.chunk" if ask.is_stream else "chat.completion"
    return {
        "id": ("chatcmpl-" if is_chat else "cmpl-") + uuid4().hex,
        "object": name,
        "created": int(time.time()),
        "model": ask.model,
        "system_fingerprint": f"sd-{bundle[:12]}",
    }
