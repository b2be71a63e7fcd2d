"""A guarding proxy: in front of an OpenAI-compatible upstream whose engine carries our probe.

Knows the upstream's marker, its canary and its chunks. Does not know models: the upstream
judges, this room believes nothing that does not say so. An answer without the marker of the
expected bundle, a stream whose choice ends without a safety object, and an upstream whose
canary does not pass are treated as failed: nothing of them is shown, and streams are closed.
Hold-back is counted in token ids, never in chunks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import httpx2

from safe_decode.serving.audit import AuditLog
from safe_decode.serving.failures import ApiError, anthropic_body, openai_body
from safe_decode.serving.gate import MARKER, App, Receive, Scope, Send
from safe_decode.serving.metrics import Metrics
from safe_decode.serving.proxy_wire import asked, events, send_event, send_json
from safe_decode.serving.relay import Relay
from safe_decode.serving.relay_messages import MessageRelay

__all__ = ["SafetyMiddleware"]

_LOG = logging.getLogger("safe_decode.serving")
_MESSAGES = "/v1/messages"
_GUARDED = ("/v1/chat/completions", "/v1/completions", _MESSAGES)
_CLOSED = {
    "action": "closed",
    "certificate": {"status": "void", "why": "the upstream did not say how it was guarded"},
}


class SafetyMiddleware:
    """Guards the endpoints of an upstream that answer; other paths go to the application.

    Args:
        app: Answers other paths.
        upstream: Address of the upstream, without /v1.
        bundle: Digest of the bundle that its engine must carry, at least 16 characters.
        key: API key for the upstream.
        holdback_tokens: Held here, besides what the upstream holds.
        canary_every_s: How long a passed canary counts.
        metrics: Counts.
        audit: One line a response.
        client: To be used instead of one's own, in tests.
    """

    def __init__(
        self,
        app: App,
        *,
        upstream: str,
        bundle: str,
        key: str | None = None,
        holdback_tokens: int = 0,
        canary_every_s: float = 15.0,
        metrics: Metrics | None = None,
        audit: AuditLog | None = None,
        client: httpx2.AsyncClient | None = None,
    ) -> None:
        self._app, self._bundle, self._k = app, bundle[:16], holdback_tokens
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        timeout = httpx2.Timeout(10.0, read=300.0)
        self._client = client or httpx2.AsyncClient(timeout=timeout)
        self._base, self._headers = upstream.rstrip("/"), headers
        self._canary_every_s, self._sound_until = canary_every_s, 0.0
        self.metrics = metrics or Metrics()
        self._audit = audit or AuditLog(None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard, or hand on."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        except ApiError as error:
            self.metrics.refused.labels(error.code or "proxy").inc()
            shape = anthropic_body if scope["path"] == _MESSAGES else openai_body
            await send_json(send, error.status, shape(error), error.headers)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path not in _GUARDED or scope["method"] != "POST":
            raise ApiError(404, f"{scope['method']} {path[:100]} is not guarded here.")
        ask = await asked(receive)
        await self._require_sound()
        asks_ids = bool(ask.get("return_token_ids"))
        request = self._client.build_request(
            "POST",
            self._base + path,
            json={**ask, "return_token_ids": True},
            headers=self._headers,
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx2.HTTPError as error:
            raise self._failed("cannot be reached") from error
        try:
            if response.status_code == 200:
                self._require_marker(response)
            kind = response.headers.get("content-type", "")
            if response.status_code == 200 and kind.startswith("text/event-stream"):
                await self._stream(response, send, path, asks_ids=asks_ids)
            else:
                await self._whole(response, send, path)
        finally:
            await response.aclose()

    async def _whole(self, response: httpx2.Response, send: Send, path: str) -> None:
        try:
            await response.aread()
            body = response.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise self._failed("sent no JSON") from error
        if response.status_code == 200:
            self._require_marks(body, path)
        elif response.status_code < 400 or not _is_error(body):
            # Whatever is no refusal could be an answer.
            raise self._failed(f"answered {response.status_code} with something else than an error")
        wait = response.headers.get("retry-after")
        await send_json(send, response.status_code, body, {"Retry-After": wait} if wait else {})

    async def _stream(
        self, response: httpx2.Response, send: Send, path: str, *, asks_ids: bool
    ) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (MARKER.encode(), self._bundle.encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        named = path == _MESSAGES
        kind = MessageRelay if named else Relay
        relay = kind(self._k, is_marked=self._is_marked, keeps_ids=asks_ids)
        try:
            async for data in events(response):
                for chunk in relay.take(data):
                    await send_event(send, chunk, named=named)
        except (httpx2.HTTPError, ValueError) as error:
            _LOG.error("the upstream failed in mid-stream: %s", type(error).__name__)
        for chunk in relay.close(_CLOSED):
            await send_event(send, chunk, named=named)
        for safety, reason in relay.ends:
            self._note(path, safety, reason)
        done = b"" if named else b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": done})

    def _require_marks(self, body: Any, path: str) -> None:  # noqa: ANN401 - any JSON
        if not isinstance(body, Mapping):
            raise self._failed("sent no JSON object")
        ends = [body] if path == _MESSAGES else body.get("choices")
        if (
            not isinstance(ends, list)
            or not ends
            or not all(isinstance(end, Mapping) for end in ends)
        ):
            raise self._failed("sent no choices")
        if not all(self._is_marked(end.get("safety")) for end in ends):
            raise self._failed("sent an answer without its safety object")
        for end in ends:
            reason = end.get("stop_reason" if path == _MESSAGES else "finish_reason")
            self._note(path, end["safety"], reason)

    def _note(self, path: str, safety: Mapping[str, Any], reason: str | None) -> None:
        action = str(safety.get("action"))
        self.metrics.rows.labels(path, str(reason)).inc()
        if action == "closed":
            self.metrics.failures.inc()
        elif action != "released":
            self.metrics.trips.labels(action, "upstream").inc()
        self._audit.write(
            {
                "time": round(time.time(), 3),
                "endpoint": path,
                "bundle": self._bundle,
                "action": action,
                "finish_reason": reason,
                "certificate": safety.get("certificate"),
            }
        )

    async def _require_sound(self) -> None:
        now = time.monotonic()
        if now < self._sound_until:
            return
        try:
            ready = await self._client.get(f"{self._base}/readyz", headers=self._headers)
        except httpx2.HTTPError as error:
            raise self._failed("cannot be reached") from error
        if ready.status_code != 200 or ready.headers.get(MARKER) != self._bundle:
            raise self._failed("has no passing canary of the expected bundle")
        self._sound_until = now + self._canary_every_s

    def _require_marker(self, response: httpx2.Response) -> None:
        if response.headers.get(MARKER) != self._bundle:
            raise self._failed("does not carry the expected guard")

    def _is_marked(self, safety: object) -> bool:
        if not isinstance(safety, Mapping) or "action" not in safety:
            return False
        certificate = safety.get("certificate")
        return isinstance(certificate, Mapping) and certificate.get("bundle") == self._bundle

    def _failed(self, why: str) -> ApiError:
        self._sound_until = 0.0
        self.metrics.failures.inc()
        _LOG.error("the upstream %s; nothing of it is shown", why)
        return ApiError(503, f"the upstream {why}.", code="upstream_not_guarded", retry_after_s=5.0)


def _is_error(body: object) -> bool:
    """Say whether a body is an error in either shape and nothing besides."""
    return isinstance(body, Mapping) and "error" in body and set(body) <= {"error", "type"}
