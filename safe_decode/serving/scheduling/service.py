"""One request from its rows to its answer: queued, collected or streamed, counted, audited.

Knows tickets, stories, metrics and the audit log. Does not know shapes or routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from safe_decode.engines.interface import Engine
from safe_decode.engines.rows import RowRequest
from safe_decode.serving.middleware.gate import key_name
from safe_decode.serving.operations.audit import AuditLog
from safe_decode.serving.operations.metrics import Metrics
from safe_decode.serving.operations.telemetry import Telemetry
from safe_decode.serving.requests.body import BodyReader
from safe_decode.serving.requests.parse import RequestParser
from safe_decode.serving.scheduling.response import Exposure, ResponseState
from safe_decode.serving.scheduling.scheduler import Scheduler
from safe_decode.serving.scheduling.tickets import RequestHandle
from safe_decode.serving.schemas.errors import ApiError
from safe_decode.serving.settings import ServeSettings
from safe_decode.streaming.events import Finished, RowEvent, Tripped

__all__ = ["ResponseInProgress", "Service"]


@dataclass
class ResponseInProgress:
    """The rows of one request on their way.

    Attributes:
        stories: One a row.
        events: Their events; the first one is known to have come.
    """

    stories: list[ResponseState]
    events: AsyncGenerator[tuple[int, RowEvent], None]


class Service:
    """All that the endpoints of one server share.

    Args:
        engine: Runs rows.
        settings: The operator's.

    Raises:
        ConfigurationError: The audit log cannot be written.
    """

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics()
        self.audit, self.telemetry = AuditLog(settings.audit), Telemetry()
        self.scheduler = Scheduler(engine, settings, self.metrics)
        shadowed = settings.shadow_keys
        self._shadow_keys = frozenset(key_name(key.get_secret_value()) for key in shadowed)
        self.desk, self.reader = RequestParser(engine, settings), BodyReader(settings.max_queue)

    def is_shadow(self, request: Request) -> bool:
        """Say whether the operator wants trips of a request told and not acted upon."""
        is_named = request.url.path in self.settings.shadow_endpoints
        return is_named or request.state.key in self._shadow_keys

    async def begin(
        self,
        rows: Sequence[RowRequest],
        request: Request,
        endpoint: str,
        *,
        is_page: bool = False,
    ) -> ResponseInProgress:
        """Queue rows and wait for their first event, so that a refusal has its status.

        Args:
            rows: What is asked.
            request: By whom.
            endpoint: For metrics and audit.
            is_page: Whether the page reads the answer.

        Raises:
            ApiError: They are not taken, or waited too long.
        """
        request.state.changed = rows[0].changes
        tickets = self.scheduler.submit(rows, request.state.key)
        exposure = Exposure(self.engine.facts, self.settings, is_page=is_page)
        stories = [ResponseState(row, exposure) for row in rows]
        events = self._told(tickets, stories, request, endpoint)
        waiting = asyncio.ensure_future(anext(events))
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((waiting, left), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ApiError(499, "the client has left.", code="client_left")
            first = waiting.result()
        finally:
            left.cancel()
            if not waiting.done():
                waiting.cancel()
                tickets.cancel()
        if isinstance(first[1], Finished) and first[1].error == "not_ready":
            raise ApiError(
                503,
                "the guard is not ready.",
                code="not_ready",
                retry_after_s=self.settings.canary_every_s,
            )
        if isinstance(first[1], Finished) and first[1].error in ("queue_timeout", "timeout"):
            raise ApiError(
                503,
                "the answer waited too long in the queue.",
                code="queue_timeout",
                retry_after_s=self.settings.queue_timeout_s / 4,
            )
        return ResponseInProgress(stories, _rejoined(first, events))

    async def finish(
        self, conversation: ResponseInProgress, request: Request
    ) -> list[ResponseState]:
        """Wait until every row has ended.

        Raises:
            ApiError: The client has left.
        """

        async def collect() -> None:
            async for _ in conversation.events:
                pass

        collecting = asyncio.ensure_future(collect())
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((collecting, left), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ApiError(499, "the client has left.", code="client_left")
            collecting.result()
        finally:
            left.cancel()
            collecting.cancel()
        return conversation.stories

    async def _told(
        self,
        tickets: RequestHandle,
        stories: Sequence[ResponseState],
        request: Request,
        endpoint: str,
    ) -> AsyncGenerator[tuple[int, RowEvent], None]:
        """Yield events, each once its story has taken it; count and audit what has ended.

        A trip that is not told is no event: not even the time at which headers leave tells of it.
        """
        try:
            async with aclosing(tickets.events()) as events:
                async for index, whole in events:
                    story = stories[index]
                    for event in story.pieces(whole):
                        story.take(event)
                        if isinstance(event, Finished):
                            self._settle(story, request, endpoint)
                        if not isinstance(event, Tripped) or story.trip_told() is not None:
                            yield index, event
        finally:
            tickets.cancel()
            for story in stories:
                if story.end is None:
                    story.end = Finished("cancelled", error="client_left")
                    self._settle(story, request, endpoint)

    def _settle(self, story: ResponseState, request: Request, endpoint: str) -> None:
        end, metrics = story.end, self.metrics
        assert end is not None
        metrics.rows.labels(endpoint, end.reason).inc()
        metrics.tokens.inc(end.shown_tokens)
        if story.trip is not None:
            category = "+".join(self.engine.facts.heads)
            metrics.trips.labels(end.outcome or "cut", category).inc()
            metrics.dropped.observe(len(story.trip.dropped))
        if story.would_block is not None:
            metrics.shadow_rows.labels(endpoint).inc()
            if story.would_block:
                category = "+".join(self.engine.facts.heads)
                metrics.would_block.labels(endpoint, self.engine.facts.redirect, category).inc()
        if end.outcome == "closed":
            metrics.failures.inc()
        if story.first_at is not None and story.last_at is not None:
            metrics.ttft.observe(story.first_at - story.began_at)
            if end.shown_tokens > 1:
                metrics.tpot.observe((story.last_at - story.first_at) / (end.shown_tokens - 1))
        record = self._record(story, request, endpoint)
        self.audit.write(record)
        told = ("endpoint", "action", "finish_reason", "shown_tokens", "prompt_tokens")
        self.telemetry.response(record["seconds"], {name: record[name] for name in told})

    def _record(self, story: ResponseState, request: Request, endpoint: str) -> dict[str, Any]:
        end = story.end
        assert end is not None
        policy, sampling = story.request.policy, story.request.sampling
        record: dict[str, Any] = {
            "time": round(time.time(), 3),
            "request": request.state.request_id,
            "key": request.state.key,
            "endpoint": endpoint,
            "model": self.settings.name,
            "bundle": self.engine.facts.bundle[:16],
            "action": end.outcome or "cut",
            "finish_reason": end.reason,
            "redirect": policy.redirect,
            "alpha": policy.alpha,
            "holdback_tokens": policy.holdback_tokens,
            "certificate": story.exposure.certificate_of(story.request).status(end.void),
            "trip_step": end.trip_step,
            "would_block": story.would_block,
            "would_redirect": self.engine.facts.redirect if story.would_block else None,
            "prompt_tokens": story.prompt_tokens,
            "prefill_tokens": story.request.prompt.prefill_tokens,
            "shown_tokens": end.shown_tokens,
            "dropped_tokens": 0 if story.trip is None else len(story.trip.dropped),
            "seed": sampling.seed,
            "changed": {one.param: [one.asked, one.served] for one in story.request.changes},
            "seconds": round(time.monotonic() - story.began_at, 4),
            "error": end.error,
        }
        if self.settings.audit_text:
            ids = repr(story.request.prompt.ids).encode()
            record["prompt_sha256"] = hashlib.sha256(ids).hexdigest()
            record["prompt_ids"] = list(story.request.prompt.ids)
            record["content"], record["refusal"] = story.content, story.refusal
        return record


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _rejoined(
    first: tuple[int, RowEvent], rest: AsyncGenerator[tuple[int, RowEvent], None]
) -> AsyncGenerator[tuple[int, RowEvent], None]:
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item
