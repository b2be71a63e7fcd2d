"""A guarding proxy: in front of an OpenAI-compatible upstream whose engine carries our probe.

Knows keys, the upstream and relays, and how they make an answer. Does not know models: the
upstream judges, and an answer that does not say so is not believed. An answer without the marker of
the expected bundle, a stream whose choice ends without a safety object, and an upstream whose
canary does not pass are treated as failed: nothing of them is shown, and streams are closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx2

from safe_decode.serving.middleware.gate import App, Gate, Receive, Scope, Send
from safe_decode.serving.operations.audit import AuditLog
from safe_decode.serving.operations.metrics import Metrics
from safe_decode.serving.proxy.anthropic_relay import MessageRelay
from safe_decode.serving.proxy.choices import End
from safe_decode.serving.proxy.deadlines import Deadline, Deadlines
from safe_decode.serving.proxy.fields import TURNED
from safe_decode.serving.proxy.openai_relay import Relay
from safe_decode.serving.proxy.requests import CHAT, COMPLETIONS, MESSAGES, ProxiedAsk, read_ask
from safe_decode.serving.proxy.settings import ProxySettings
from safe_decode.serving.proxy.upstream import Upstream
from safe_decode.serving.proxy.whole import whole_of
from safe_decode.serving.proxy.wire import events, read_whole, send_event, send_json
from safe_decode.serving.schemas.errors import ApiError, anthropic_body, openai_body

__all__ = ["ProxyParts", "SafetyMiddleware"]

_LOG = logging.getLogger("safe_decode.serving")
_GUARDED = (CHAT, COMPLETIONS, MESSAGES)
_CLOSING_SECONDS = 10.0
_CLOSED = {
    "action": "closed",
    "certificate": {"status": "void", "why": "the upstream did not say how it was guarded"},
}
_CUT = {"action": "cut", "certificate": {"status": "void", "why": "the answer was cut off"}}


@dataclass(frozen=True)
class ProxyParts:
    """What the endpoints of one proxy share.

    Attributes:
        upstream: Who answers.
        metrics: Counts.
        audit: One line a response.
        deadlines: Of the answers in flight.
    """

    upstream: Upstream
    metrics: Metrics
    audit: AuditLog
    deadlines: Deadlines

    @classmethod
    def of(cls, settings: ProxySettings, client: httpx2.AsyncClient | None = None) -> ProxyParts:
        """Make them.

        Args:
            settings: The operator's.
            client: To be used for the upstream instead of one's own, in tests.

        Raises:
            ConfigurationError: The audit log cannot be written.
        """
        metrics = Metrics()
        return cls(
            upstream=Upstream(settings, metrics, client),
            metrics=metrics,
            audit=AuditLog(settings.audit),
            deadlines=Deadlines(settings.request_timeout_s),
        )

    async def close(self) -> None:
        """Let go of connections and files."""
        await self.upstream.close()
        self.audit.close()


class SafetyMiddleware:
    """Guards the endpoints of an upstream that answer; other paths go to the application.

    Whatever lies under /v1/ passes the gate of the server first: keys, sizes, counts.

    Args:
        app: Answers other paths.
        settings: The upstream, its bundle, keys and limits.
        parts: Shared with whoever tells of the proxy's operation; None: its own.
    """

    def __init__(
        self, app: App, settings: ProxySettings, *, parts: ProxyParts | None = None
    ) -> None:
        self._app, self._settings = app, settings
        self.parts = parts or ProxyParts.of(settings)
        self._gate = Gate(
            self._guarded, settings.as_server, self.parts.metrics, marker=settings.marker
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard, or hand on."""
        is_ours = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await (self._gate if is_ours else self._app)(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, receive, send)
        except ApiError as error:
            self.parts.metrics.refused.labels(error.code or "proxy").inc()
            shape = anthropic_body if scope["path"] == MESSAGES else openai_body
            await send_json(send, error.status, shape(error), error.headers)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, settings = scope["path"], self._settings
        if path not in _GUARDED or scope["method"] != "POST":
            raise ApiError(404, "This path and method are not guarded here.")
        body = (await receive())["body"]  # the gate has read it whole, within its bound
        ask = read_ask(
            path,
            body,
            max_choices=settings.max_choices,
            is_strict=settings.strict_parameters,
        )
        scope["state"]["ignored"] = ask.ignored
        async with self.parts.deadlines.one(receive) as deadline:
            if ask.is_stream:
                await self._stream(ask, send, deadline)
            else:
                await self._whole(ask, send, deadline)

    async def _whole(self, ask: ProxiedAsk, send: Send, deadline: Deadline) -> None:
        upstream = self.parts.upstream
        try:
            async with deadline.within():
                await upstream.require_sound()
                async with upstream.asked(ask) as response:
                    most = self._settings.max_answer_bytes
                    data = await read_whole(response, max_bytes=most)
                whole = whole_of(data, ask, self._settings.marker)
        except (httpx2.HTTPError, TimeoutError) as error:
            raise deadline.refusal() or upstream.failed("did not finish its answer") from error
        except ValueError as error:
            _LOG.error("the upstream's answer is not believed: %s", error)
            raise upstream.failed("sent an answer that does not say how it was guarded") from error
        for end in whole.ends:
            self._note(ask, end)
        await send_json(send, 200, whole.body)

    async def _stream(self, ask: ProxiedAsk, send: Send, deadline: Deadline) -> None:
        kind = MessageRelay if ask.path == MESSAGES else Relay
        settings, is_named = self._settings, ask.path == MESSAGES
        relay = kind(ask, bundle=settings.marker, holdback_tokens=settings.holdback_tokens)
        has_begun = False
        try:
            async with deadline.within(), aclosing(self._relayed(ask, relay)) as chunks:
                async for chunk in chunks:
                    if not has_begun:
                        has_begun = True
                        await _begin(send)
                    await send_event(send, chunk, named=is_named)
        except TimeoutError as error:
            if not has_begun:
                failed = deadline.refusal() or self.parts.upstream.failed("did not answer in time")
                raise failed from error
            _LOG.error("an answer did not end in time, or its reader left")
        if not has_begun:
            await _begin(send)
        closing = list(relay.close(_CUT if deadline.cut_by else _CLOSED))
        for end in relay.ends:
            self._note(ask, end)
        await _send_last(send, closing, named=is_named)

    async def _relayed(
        self, ask: ProxiedAsk, relay: Relay | MessageRelay
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield what may be shown, until the stream ends or is not believed any more."""
        settings, upstream = self._settings, self.parts.upstream
        await upstream.require_sound()
        async with upstream.asked(ask) as response:
            try:
                async for data in events(
                    response,
                    max_event_bytes=settings.max_event_bytes,
                    max_bytes=settings.max_answer_bytes,
                ):
                    for chunk in relay.take(data):
                        yield chunk
                    if relay.is_over:
                        return
            except Exception as error:  # whatever fails, the reader gets a proper end
                _LOG.error(
                    "a stream of the upstream is closed: %s: %s", type(error).__name__, error
                )

    def _note(self, ask: ProxiedAsk, end: End) -> None:
        action, metrics = str(end.safety["action"]), self.parts.metrics
        metrics.rows.labels(ask.path, end.reason).inc()
        if action == "closed":
            metrics.failures.inc()
        elif action in TURNED:
            metrics.trips.labels(action, "upstream").inc()
        self.parts.audit.write(
            {
                "time": round(time.time(), 3),
                "endpoint": ask.path,
                "bundle": self._settings.marker,
                "action": action,
                "finish_reason": end.reason,
                "certificate": end.safety["certificate"],
            }
        )


async def _begin(send: Send) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_last(send: Send, closing: list[dict[str, Any]], *, named: bool) -> None:
    """Send the end of a stream, to a reader who may take nothing any more."""
    try:
        async with asyncio.timeout(_CLOSING_SECONDS):
            for chunk in closing:
                await send_event(send, chunk, named=named)
            done = b"" if named else b"data: [DONE]\n\n"
            await send({"type": "http.response.body", "body": done})
    except TimeoutError:
        _LOG.error("a reader takes nothing more; its connection is closed")
