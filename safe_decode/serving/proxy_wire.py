"""How the proxy reads requests and streams, and writes answers. Plain ASGI.

Knows bodies, server-sent events and sizes. Does not know marks, guards or upstreams.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from safe_decode.serving.failures import ApiError
from safe_decode.serving.gate import Receive, Send

__all__ = ["asked", "events", "send_event", "send_json"]

_MAX_BODY = 1_000_000


async def asked(receive: Receive) -> dict[str, Any]:
    """Read a request's body.

    Raises:
        ApiError: It is too large, or no JSON object.
    """
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _MAX_BODY:
            raise ApiError(413, f"the body is larger than {_MAX_BODY} bytes; send less.")
        if not message.get("more_body", False):
            break
    try:
        ask = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON.", code="invalid_value") from error
    if not isinstance(ask, dict):
        raise ApiError(400, "the body is no JSON object.", code="invalid_value")
    return ask


async def events(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Yield the data of server-sent events; bytes, so that split characters do no harm."""
    waiting = b""
    async for piece in response.aiter_raw():
        waiting += piece.replace(b"\r", b"")
        *whole, waiting = waiting.split(b"\n\n")
        for event in whole:
            lines = [line[5:].lstrip() for line in event.split(b"\n") if line[:5] == b"data:"]
            if lines:
                yield b"\n".join(lines)


async def send_event(send: Send, body: Mapping[str, Any], *, named: bool) -> None:
    """Send one event.

    Args:
        send: Of the reader.
        body: Written as JSON.
        named: Name the event by its type, as Anthropic does.
    """
    line = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    name = f"event: {body['type']}\n" if named else ""
    data = f"{name}data: {line}\n\n".encode()
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def send_json(
    send: Send, status: int, body: object, headers: Mapping[str, str] | None = None
) -> None:
    """Send a whole answer."""
    content = json.dumps(body).encode()
    own = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    own += [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": content})
