"""How the proxy reads answers and streams within bounds, and writes its own. Plain ASGI.

Knows bodies, server-sent events and sizes. Does not know marks, guards or what is said.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from safe_decode.serving.middleware.gate import Send

__all__ = ["EventReader", "events", "read_whole", "send_event", "send_json"]


class EventReader:
    """Finds server-sent events in bytes that arrive in pieces.

    Lines end with LF, CR or CRLF, wherever a piece ends. An event that the stream does not
    finish with an empty line is none.

    Args:
        max_bytes: Of one event.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._data = bytearray()
        self._has_data = self._after_cr = False

    def take(self, piece: bytes) -> list[bytes]:
        """Take a piece; return the data of the events that it completes.

        Raises:
            ValueError: An event is too large.
        """
        if self._after_cr and piece[:1] == b"\n":
            piece = piece[1:]
            self._after_cr = False
        if not piece:
            return []
        self._after_cr = piece.endswith(b"\r")
        first, *others = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        whole: list[bytes] = []
        self._extend(first)
        for part in others:
            whole += self._end_line()
            self._extend(part)
        return whole

    def _extend(self, part: bytes) -> None:
        self._line += part
        if len(self._line) + len(self._data) > self._max_bytes:
            raise ValueError(f"an event is larger than {self._max_bytes} bytes")

    def _end_line(self) -> list[bytes]:
        line = bytes(self._line)
        self._line.clear()
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data += (b"\n" if self._has_data else b"") + value.removeprefix(b" ")
                self._has_data = True
            return []
        data, has_data = bytes(self._data), self._has_data
        self._data.clear()
        self._has_data = False
        return [data] if has_data else []


async def events(
    response: httpx2.Response, *, max_event_bytes: int, max_bytes: int
) -> AsyncIterator[bytes]:
    """Yield the data of server-sent events; bytes, so that split characters do no harm.

    Raises:
        ValueError: An event or the stream is too large.
    """
    reader, size = EventReader(max_event_bytes), 0
    async for piece in response.aiter_raw():
        size += len(piece)
        if size > max_bytes:
            raise ValueError(f"a stream is larger than {max_bytes} bytes")
        for event in reader.take(piece):
            yield event


async def read_whole(response: httpx2.Response, *, max_bytes: int) -> bytes:
    """Read a whole body, which nothing decompresses.

    Raises:
        ValueError: It is too large.
    """
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > max_bytes:
            raise ValueError(f"a body is larger than {max_bytes} bytes")
    return bytes(body)


async def send_event(send: Send, body: Mapping[str, Any], *, named: bool) -> None:
    """Send one event.

    Args:
        send: Of the reader.
        body: Written as JSON.
        named: Name the event by its type, as Anthropic does.
    """
    line = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    name = f"event: {body['type']}\n" if named else ""
    data = f"{name}data: {line}\n\n".encode()
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def send_json(
    send: Send, status: int, body: object, headers: Mapping[str, str] | None = None
) -> None:
    """Send a whole answer."""
    content = json.dumps(body, allow_nan=False).encode()
    own = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    own += [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": content})
