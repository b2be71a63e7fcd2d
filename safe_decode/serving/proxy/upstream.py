"""The upstream: how it is asked, and what must be true before anything it says is read.

Knows its address, key, canary and mark. Does not know what answers say. Its answers are read
within bounds, and never decompressed: a small body that is packed can fill any memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

from safe_decode.serving.middleware.gate import MARKER
from safe_decode.serving.operations.metrics import Metrics
from safe_decode.serving.proxy.fields import object_of, parsed
from safe_decode.serving.proxy.requests import ProxiedAsk, known_parameters
from safe_decode.serving.proxy.settings import ProxySettings
from safe_decode.serving.proxy.wire import read_whole
from safe_decode.serving.schemas.errors import ApiError

__all__ = ["Upstream"]

_LOG = logging.getLogger("safe_decode.serving")
_MAX_ERROR_BYTES = 65_536
_MAX_WAIT_S = 3600
_RETRIES_CANARY_S = 1.0
_PASSED_ON = (400, 404, 408, 413, 422, 429)
_CODES = (
    *("context_length_exceeded", "invalid_value", "model_not_found", "unknown_parameter"),
    *("unsupported_parameter", "body_too_large", "slow_body", "queue_full", "rate_limit"),
)
_EVENTS, _JSON = "text/event-stream", "application/json"


class Upstream:
    """One upstream.

    Args:
        settings: Its address, its key, the bundle it must carry, and bounds.
        metrics: Counts failures.
        client: To be used instead of one's own, in tests.
    """

    def __init__(
        self,
        settings: ProxySettings,
        metrics: Metrics,
        client: httpx2.AsyncClient | None = None,
    ) -> None:
        self._settings, self._metrics = settings, metrics
        self._client = client or httpx2.AsyncClient(
            timeout=httpx2.Timeout(settings.connect_timeout_s, read=settings.request_timeout_s),
            limits=httpx2.Limits(max_connections=settings.max_upstream_connections),
        )
        self._sound_until = self._unsound_until = 0.0
        self._looks = asyncio.Lock()

    async def require_sound(self) -> None:
        """Ask for its canary, unless it passed a moment ago.

        Raises:
            ApiError: It does not pass, is of another bundle, or nobody answers.
        """
        async with self._looks:  # one look, however many wait for it
            now = time.monotonic()
            if now < self._sound_until:
                return
            if now < self._unsound_until:
                raise self.failed("has no passing canary of the expected bundle")
            if not await self._is_sound():
                self._unsound_until = time.monotonic() + _RETRIES_CANARY_S
                raise self.failed("has no passing canary of the expected bundle")
            self._sound_until = time.monotonic() + self._settings.canary_every_s

    @asynccontextmanager
    async def asked(self, ask: ProxiedAsk) -> AsyncIterator[httpx2.Response]:
        """Ask, and yield an answer that carries the mark in its headers, unread.

        Raises:
            ApiError: It refuses, cannot be reached, or answers without the mark, packed, or in
                another form than was asked for.
        """
        key = self._settings.upstream_key
        headers = {"accept-encoding": "identity"}
        if key is not None:
            headers["authorization"] = f"Bearer {key.get_secret_value()}"
        request = self._client.build_request(
            "POST", self._settings.upstream + ask.path, json=dict(ask.body), headers=headers
        )
        try:
            response = await self._client.send(request, stream=True, follow_redirects=False)
        except httpx2.PoolTimeout as error:
            raise ApiError(
                503, "the proxy is busy; try again.", code="busy", retry_after_s=5.0
            ) from error
        except httpx2.HTTPError as error:
            raise self.failed("cannot be reached") from error
        try:
            if response.status_code != 200:
                raise await self._refusal(response)
            self._require_ours(response, _EVENTS if ask.is_stream else _JSON)
            yield response
        finally:
            await response.aclose()

    def failed(self, why: str) -> ApiError:
        """Return the refusal of an upstream that is not believed; its canary is asked for anew."""
        self._sound_until = 0.0
        self._metrics.failures.inc()
        _LOG.error("the upstream %s; nothing of it is shown", why)
        return ApiError(503, f"the upstream {why}.", code="upstream_not_guarded", retry_after_s=5.0)

    async def close(self) -> None:
        """Let go of its connections."""
        await self._client.aclose()

    async def _is_sound(self) -> bool:
        # Without the key: whoever asks for /readyz of the proxy is nobody.
        request = self._client.build_request(
            "GET", f"{self._settings.upstream}/readyz", headers={"accept-encoding": "identity"}
        )
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                ready = await self._client.send(request, stream=True, follow_redirects=False)
                await ready.aclose()  # its body says nothing that its header does not
        except (httpx2.HTTPError, TimeoutError) as error:
            _LOG.error("the upstream's canary cannot be reached: %s", type(error).__name__)
            return False
        return ready.status_code == 200 and self._is_marked(ready)

    def _is_marked(self, response: httpx2.Response) -> bool:
        return response.headers.get(MARKER) == self._settings.marker

    def _require_ours(self, response: httpx2.Response, form: str) -> None:
        if not self._is_marked(response):
            raise self.failed("does not carry the expected guard")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self.failed("packed its answer, though it was asked not to")
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != form:
            raise self.failed(f"answered in another form than {form}")

    async def _refusal(self, response: httpx2.Response) -> ApiError:
        """Read why the upstream refuses. Its words stay behind, since they could be an answer."""
        status = response.status_code
        if status in (401, 403):
            return self.failed("does not accept the proxy's key")
        if status in (500, 503):
            _LOG.error("the upstream answered %d", status)
            return ApiError(
                503,
                f"the upstream answered {status}.",
                code="upstream_error",
                retry_after_s=_wait_of(response) or 5.0,
            )
        if status not in _PASSED_ON:
            return self.failed(f"answered {status}")
        code, param = None, None
        try:
            body = parsed(await read_whole(response, max_bytes=_MAX_ERROR_BYTES))
            told = object_of(body.get("error"))
            code = next((known for known in _CODES if known == told.get("code")), None)
            param = next(
                (known for known in known_parameters() if known == told.get("param")), None
            )
        except (httpx2.HTTPError, ValueError) as error:
            _LOG.warning("the upstream's refusal is unreadable: %s", type(error).__name__)
        about = f" because of {param}" if param else ""
        return ApiError(
            status,
            f"the upstream refused the request{about} ({code or status}).",
            param=param,
            code=code,
            retry_after_s=_wait_of(response),
        )


def _wait_of(response: httpx2.Response) -> float | None:
    wait = response.headers.get("retry-after", "")
    return min(float(wait), _MAX_WAIT_S) if wait.isascii() and wait.isdigit() else None
