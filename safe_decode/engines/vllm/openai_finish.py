"""The end of a tripped answer as OpenAI's clients know it, for vLLM's own server.

vLLM's engine has no finish reason "content_filter"; the guard says it in `stop_reason`. This
middleware moves it where clients look, in whole answers and in streams, and withdraws the tool
calls of such an answer. One option turns it on:

    vllm serve M --middleware safe_decode.engines.vllm.openai_finish.ContentFilterFinish

Knows ASGI and the shape of answers. Does not know the guard, and holds no text back: a frame of a
stream goes on when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping

from safe_decode.typing import Json

__all__ = ["ContentFilterFinish"]

Message = MutableMapping[str, object]
_Send = Callable[[Message], Awaitable[None]]
_App = Callable[[Message, Callable[[], Awaitable[Message]], _Send], Awaitable[None]]

_REASON = "content_filter"
_MARK = _REASON.encode()
_BREAK = b"\n\n"


class ContentFilterFinish:
    """ASGI middleware.

    Args:
        app: What it stands before.
    """

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: _Send
    ) -> None:
        """Let a request pass and look at what is answered."""
        is_http = scope["type"] == "http"
        await self._app(scope, receive, _Answer(send).send if is_http else send)


class _Answer:
    """One answer on its way to its client."""

    def __init__(self, send: _Send) -> None:
        self._send, self._kind = send, b""
        self._start: Message = {}
        self._held = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            self._kind = dict(_headers(message)).get(b"content-type", b"").split(b";")[0]
            if self._kind != b"application/json":
                await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._kind == b"application/json":
            await self._take_whole(message)
        elif self._kind == b"text/event-stream":
            await self._take_frames(message)
        else:
            await self._send(message)

    async def _take_whole(self, message: Message) -> None:
        self._held += _body(message)
        if message.get("more_body"):
            return
        body = _finished(self._held)
        headers = [(k, v) for k, v in _headers(self._start) if k.lower() != b"content-length"]
        length = (b"content-length", str(len(body)).encode())
        await self._send({**self._start, "headers": [*headers, length]})
        await self._send({"type": "http.response.body", "body": body})

    async def _take_frames(self, message: Message) -> None:
        *frames, self._held = (self._held + _body(message)).split(_BREAK)
        body = b"".join(_frame(frame) + _BREAK for frame in frames)
        if not message.get("more_body"):
            body, self._held = body + self._held, b""
        await self._send({**message, "body": body})


def _headers(message: Message) -> list[tuple[bytes, bytes]]:
    headers = message.get("headers")
    assert isinstance(headers, (list, tuple))
    return [(bytes(name).lower(), bytes(value)) for name, value in headers]


def _body(message: Message) -> bytes:
    body = message.get("body", b"")
    assert isinstance(body, bytes)
    return body


def _frame(frame: bytes) -> bytes:
    data = frame.removeprefix(b"data: ")
    return frame if data == frame else b"data: " + _finished(data)


def _finished(body: bytes) -> bytes:
    """Name the end of each tripped choice; what holds none, or is no JSON, stays byte for byte."""
    if _MARK not in body:
        return body
    try:
        answer: Json = json.loads(body)
    except ValueError:
        return body
    choices = answer.get("choices") if isinstance(answer, dict) else None
    tripped = [
        one
        for one in (choices if isinstance(choices, list) else ())
        if isinstance(one, dict) and one.get("stop_reason") == _REASON
    ]
    for choice in tripped:
        choice["finish_reason"] = _REASON
        said = choice.get("message")
        if isinstance(said, dict) and said.get("tool_calls"):
            said["tool_calls"] = []
    return json.dumps(answer, separators=(",", ":")).encode() if tripped else body
