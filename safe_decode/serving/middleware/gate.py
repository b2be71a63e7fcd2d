"""What stands before every endpoint: hosts, keys, sizes, headers, counts. Plain ASGI.

Knows bodies as bytes, keys and headers. Does not know what is asked. Every path that is not named
here as open wants a key, whether it exists or not, and what is not HTTP is refused. A body is
read here as a whole, within its limit and time, so that nothing behind this door waits for a slow
sender.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from uuid import uuid4

from safe_decode.serving.middleware.hosts import AllowedHosts
from safe_decode.serving.operations.metrics import Metrics
from safe_decode.serving.requests.admission import CHANGED, IGNORED, shown_names
from safe_decode.serving.schemas.errors import ApiError, anthropic_body, openai_body
from safe_decode.serving.settings import ServeSettings

__all__ = ["MARKER", "Gate", "key_name"]

MARKER = "x-safe-decode-bundle"
"""The header that says by which bundle an answer was guarded."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN = frozenset({"/", "/healthz", "/readyz", "/openapi.json"})
"""Paths that tell nobody's texts and start no work; so do the page's files."""
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


class Gate:
    """Wraps an application.

    Args:
        app: Behind the gate.
        settings: Limits and keys.
        metrics: Counts.
        marker: Digest of the bundle; every answer of /v1 carries it.
    """

    def __init__(self, app: App, settings: ServeSettings, metrics: Metrics, marker: str) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._hosts = AllowedHosts(settings.host, settings.allowed_hosts)
        self._marker = (MARKER.encode(), marker.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        request_id = uuid4().hex
        path = scope["path"]
        is_anthropic = path.startswith("/v1/messages")

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(_endpoint(path), message["status"]).inc()
                own = [*_HEADERS, (b"x-request-id", request_id.encode()), self._marker]
                own += _told_of(scope.get("state", {}))
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        try:
            self._require_host(scope)
            scope.setdefault("state", {})["key"] = self._key(scope)
            scope["state"]["request_id"] = request_id
            body = await self._body(scope, receive)
        except ApiError as error:
            self._metrics.refused.labels(error.code or "gate").inc()
            shape = anthropic_body if is_anthropic else openai_body
            await _refuse(answer, error, shape(error))
            return
        await self._app(scope, _replayed(body, receive), answer)

    def _require_host(self, scope: Scope) -> None:
        if not self._hosts.admits(dict(scope["headers"]).get(b"host")):
            raise ApiError(
                421,
                "this server is not called by that Host; its operator names hosts in "
                "allowed_hosts.",
                code="host_not_allowed",
            )

    def _key(self, scope: Scope) -> str:
        path, settings = scope["path"], self._settings
        is_read = scope["method"] in ("GET", "HEAD")
        if path in _OPEN or (path.startswith("/page/") and is_read):
            return "nobody"
        wanted = (*settings.api_keys, *settings.shadow_keys)
        is_open = not wanted
        if path.rstrip("/") == "/metrics":
            wanted, is_open = settings.operator_keys, is_open and not settings.operator_keys
        if is_open:
            return "anybody"
        given = _given_key(scope)
        # Every key is compared, so that the time tells nothing.
        hits = [hmac.compare_digest(given.encode(), k.get_secret_value().encode()) for k in wanted]
        if not any(hits):
            raise ApiError(
                401,
                "Incorrect API key provided; pass one as 'Authorization: Bearer KEY' or "
                "'x-api-key: KEY'.",
                code="invalid_api_key",
            )
        return key_name(given)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._settings.max_body_bytes
        too_large = ApiError(
            413, f"the body is larger than {limit} bytes; send less.", code="body_too_large"
        )
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(499, "the client has left.", code="client_left")
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        break
        except TimeoutError as error:
            raise ApiError(408, "the body did not arrive in time.", code="slow_body") from error
        return bytes(body)


def key_name(key: str) -> str:
    """Return a name for a key that does not give it away."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _given_key(scope: Scope) -> str:
    headers = dict(scope["headers"])
    bearer: str = headers.get(b"authorization", b"").decode("latin-1")
    if bearer[:7].lower() == "bearer ":
        return bearer[7:].strip()
    key: bytes = headers.get(b"x-api-key", b"")
    return key.decode("latin-1")


def _told_of(state: MutableMapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """Write the headers that say what of a request was ignored, and what was changed."""
    told = []
    if state.get("ignored"):
        told.append((IGNORED.encode(), shown_names(state["ignored"]).encode()))
    if state.get("changed"):
        values = ", ".join(f"{one.param}={one.served:g}" for one in state["changed"])
        told.append((CHANGED.encode(), values.encode()))
    return told


def _endpoint(path: str) -> str:
    known = (
        *("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/models"),
        *("/v1/responses", "/v1/messages/count_tokens", "/tokenize"),
    )
    found = next((name for name in known if path == name), None)
    return found or ("page" if path == "/" or path.startswith("/page/") else "other")


def _replayed(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()  # only a disconnect can follow
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Send, error: ApiError, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),
        *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
