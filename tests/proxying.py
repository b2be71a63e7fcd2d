"""Upstreams for tests of the proxy: scripted ones in this process, and clients through a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2

from safe_decode.serving.proxy.middleware import ProxyParts, SafetyMiddleware
from safe_decode.serving.proxy.requests import CHAT, COMPLETIONS, MESSAGES, ProxiedAsk
from safe_decode.serving.proxy.settings import ProxySettings

BUNDLE = "0123456789abcdef" * 2
MARK = BUNDLE[:16]
CHAT_BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: CHAT_BODY,
    COMPLETIONS: {"model": "m", "prompt": "hello"},
    MESSAGES: {**CHAT_BODY, "max_tokens": 64},
}


def proxy_settings(**changes: Any) -> ProxySettings:
    """Settings that no environment of the machine changes."""
    given = {"upstream": "http://upstream", "bundle": BUNDLE, "port": 0, **changes}
    return ProxySettings.model_validate(given)


def ours(action: str = "released", **certificate: Any) -> dict[str, Any]:
    """A safety object with the mark."""
    return {"action": action, "certificate": {"status": "valid", "bundle": MARK, **certificate}}


def asking(path: str = CHAT, **changes: Any) -> ProxiedAsk:
    """A stream that was asked for."""
    return ProxiedAsk(path, {}, "m", **{"is_stream": True, **changes})


class Upstream:
    """An ASGI application that answers as it is told, and remembers what it was asked.

    Args:
        answer: The body: bytes, pieces of a stream, or an object that is sent as JSON.
        status: Of the answer.
        ready: Status of /readyz.
        mark: In the headers of the answer; None: none.
        ready_mark: In those of /readyz.
        headers: Further ones of the answer.
    """

    def __init__(
        self,
        answer: Any,
        *,
        status: int = 200,
        ready: int = 200,
        mark: str | None = MARK,
        ready_mark: str | None = MARK,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.answer, self.status, self.ready = answer, status, ready
        self.mark, self.ready_mark = mark, ready_mark
        self.headers = headers or {}
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.given: list[dict[str, str]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer."""
        self.paths.append(scope["path"])
        self.given.append({k.decode(): v.decode() for k, v in scope["headers"]})
        if scope["path"] == "/readyz":
            await self._send(send, self.ready, self.ready_mark, {}, [b"{}"])
            return
        self.asked.append(json.loads((await receive())["body"]))
        is_stream = isinstance(self.answer, list)
        kind = "text/event-stream" if is_stream else "application/json"
        body = self.answer
        if not is_stream:
            body = [body if isinstance(body, bytes) else json.dumps(body).encode()]
        await self._send(send, self.status, self.mark, {"content-type": kind, **self.headers}, body)

    async def _send(self, send: Any, status: int, mark: Any, headers: Any, body: Any) -> None:
        own = [(name.encode(), value.encode()) for name, value in headers.items()]
        own += [] if mark is None else [(b"x-safe-decode-bundle", mark.encode())]
        await send({"type": "http.response.start", "status": status, "headers": own})
        for piece in body:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def socket_upstream(*pieces: bytes, then: str = "close") -> AsyncIterator[str]:
    """Serve one stream over a socket, its canary passing; yields the address.

    Args:
        *pieces: Of the stream, without its headers.
        then: What follows: `close` the connection, `hang`, or `drip` comments for ever.
    """
    left = asyncio.Event()
    serving = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        line = await reader.readline()
        head = f"HTTP/1.1 200 OK\r\nx-safe-decode-bundle: {MARK}\r\n".encode()
        with contextlib.suppress(ConnectionError):  # the proxy has had enough
            if b"/readyz" in line:
                writer.write(head + b"content-length: 0\r\nconnection: close\r\n\r\n")
            else:
                writer.write(head + b"content-type: text/event-stream\r\n\r\n")
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                while then != "close" and not left.is_set():
                    if then == "drip":
                        writer.write(b": still here\n")
                    await asyncio.sleep(0.01)
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        left.set()
        server.close()
        await asyncio.gather(*serving)


async def _nothing(*_: Any) -> None:
    raise AssertionError("another path was reached")


def through(
    upstream: Any,
    body: Any,
    *,
    path: str = CHAT,
    headers: dict[str, str] | None = None,
    times: int = 1,
    **settings: Any,
) -> httpx2.Response:
    """Ask `times` times through a proxy; returns the last answer.

    Args:
        upstream: An ASGI application.
        body: JSON, or bytes as they are.
        path: The endpoint.
        headers: Of the client.
        times: Requests, one after the other.
        **settings: Of the proxy.
    """

    async def call() -> httpx2.Response:
        inner = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=upstream))
        own = proxy_settings(**settings)
        parts = ProxyParts.of(own, inner)
        transport = httpx2.ASGITransport(app=SafetyMiddleware(_nothing, own, parts=parts))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as outer:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            for _ in range(times):
                answer = await outer.post(path, content=content, headers=headers)
        await parts.close()
        return answer

    return asyncio.run(call())


def sse(*bodies: Any, done: bool = True) -> list[bytes]:
    """A stream of events, one a piece."""
    told = [b"data: " + (b if isinstance(b, bytes) else json.dumps(b).encode()) for b in bodies]
    return [event + b"\n\n" for event in (*told, *((b"data: [DONE]",) if done else ()))]


def chunk(
    text: str = "", ids: Any = (), *, index: Any = 0, refusal: str | None = None, **choice: Any
) -> dict[str, Any]:
    """A chunk of a chat completion."""
    delta: dict[str, Any] = {"content": text} if text else {}
    if refusal is not None:
        delta["refusal"] = refusal
    return {"choices": [{"index": index, "delta": delta, "token_ids": list(ids), **choice}]}


def ended(reason: str = "stop", action: str = "released", **choice: Any) -> dict[str, Any]:
    """The last chunk of a choice."""
    return chunk(finish_reason=reason, safety=ours(action), **choice)


def chunks_in(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The chunks of an answer, which ends with [DONE]."""
    told = answer.text.strip().split("\n\n")
    assert told[-1] == "data: [DONE]"
    return [json.loads(one.removeprefix("data: ")) for one in told[:-1]]


def shown_in(chunks: list[dict[str, Any]], field: str = "content") -> str:
    """What a client shows of chunks."""
    choices = [choice for told in chunks for choice in told["choices"]]
    return "".join(choice["delta"].get(field) or "" for choice in choices)


def named_events_in(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The events of an answer in Anthropic's shape."""
    pairs = [event.split("\n") for event in answer.text.strip().split("\n\n")]
    told = [(name.removeprefix("event: "), json.loads(data[6:])) for name, data in pairs]
    assert all(name == body["type"] for name, body in told)
    return [body for _, body in told]
