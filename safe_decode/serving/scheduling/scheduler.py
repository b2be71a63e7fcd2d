"""Who runs when: a bounded queue in front of the engine.

Rows join the next run, not a running one: a run is one call of the guarded loop, which holds
the engine's laws, and rows cannot enter it without copying that loop. Each worker takes the
oldest rows that admit each other as soon as it is free; a row's end is told at once.

Knows queues, threads and limits. Does not know models or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from safe_decode.engines.interface import Engine
from safe_decode.engines.rows import RowRequest
from safe_decode.serving.operations.canary_watch import CanaryWatch
from safe_decode.serving.operations.metrics import Metrics
from safe_decode.serving.scheduling.tickets import EventBridge, QueuedRow, RequestHandle
from safe_decode.serving.schemas.errors import ApiError
from safe_decode.serving.settings import ServeSettings
from safe_decode.streaming.events import Finished
from safe_decode.streaming.openmp import release_workers

__all__ = ["Scheduler"]

_LOG = logging.getLogger("safe_decode.serving")

_GAP_SECONDS = 1.0
"""So long the canary waits for a gap between runs; in longer runs it goes beside them."""


class Scheduler:
    """Queues rows and runs them.

    Args:
        engine: Runs them.
        settings: Limits.
        metrics: Counts.
    """

    def __init__(self, engine: Engine, settings: ServeSettings, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self._settings = settings
        self._queue: deque[QueuedRow] = deque()
        self._running: set[QueuedRow] = set()
        self._changed = threading.Condition()
        self._is_draining = self._is_stopped = self._is_paused = False
        self._post: EventBridge | None = None
        self._run_seconds = 1.0
        self.canary = CanaryWatch(
            engine,
            metrics,
            every_s=settings.canary_every_s,
            pause=self._pause,
            on_failure=self._close_all,
        )

    @property
    def is_serving(self) -> bool:
        """Say whether rows are taken."""
        return self.canary.is_sound and not self._is_draining

    @property
    def in_flight(self) -> int:
        """Count the rows that wait or run."""
        return len(self._queue) + len(self._running)

    def start(self) -> None:
        """Begin; on the event loop. The canary decides whether anything is served."""
        self._post = EventBridge(asyncio.get_running_loop())
        self.canary.check()
        release_workers()  # of the event loop, which computes no more
        for number in range(self._settings.workers):
            threading.Thread(
                target=self._work, name=f"safe-decode-run-{number}", daemon=True
            ).start()
        self.canary.start()

    def submit(self, requests: Sequence[RowRequest], key: str) -> RequestHandle:
        """Queue the rows of one request, all or none.

        Args:
            requests: The rows.
            key: Whose they are.

        Raises:
            ApiError: 503 while starting, refused by the canary or ending; 429 with a full
                queue, or too many rows of one key.
        """
        if not self.is_serving or self._post is None:
            self.metrics.refused.labels("not_ready").inc()
            raise ApiError(
                503,
                "the server is ending" if self._is_draining else "the guard is not ready",
                code="not_ready",
                retry_after_s=self._settings.shutdown_grace_s,
            )
        limit = self._settings.max_rows_per_key
        with self._changed:
            own = sum(t.key == key for t in (*self._queue, *self._running))
            if limit is not None and own + len(requests) > limit:
                self._refuse("rate_limit", f"at most {limit} answers at a time for one key")
            if len(self._queue) + len(requests) > self._settings.max_queue:
                self._refuse("queue_full", f"{len(self._queue)} answers wait already")
            tickets = RequestHandle(requests, key, self._post, self._settings.request_timeout_s)
            self._queue.extend(tickets.tickets)
            self.metrics.queue.set(len(self._queue))
            self._changed.notify_all()
        return tickets

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, let rows end, then end what is left; stop the workers.

        Args:
            grace_s: What rows have left to end by themselves.
        """
        self._is_draining = True
        deadline = time.monotonic() + grace_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for ticket in (*self._queue, *self._running):
            ticket.row.cancel()
        while self.in_flight and time.monotonic() < deadline + 10:
            await asyncio.sleep(0.05)
        self.canary.stop()
        with self._changed:
            self._is_stopped = True
            left = (*self._queue, *self._running)
            self._changed.notify_all()
        for ticket in left:  # an engine that hangs keeps nobody waiting
            ticket.row.emit(Finished("cancelled", error="shutdown"))

    def begin_drain(self) -> None:
        """Take nothing new from now on."""
        self._is_draining = True

    def _refuse(self, why: str, message: str) -> None:
        self.metrics.refused.labels(why).inc()
        runs = math.ceil((len(self._queue) + 1) / self._settings.max_batch)
        raise ApiError(
            429,
            f"{message}; try again later.",
            code=why,
            retry_after_s=runs * self._run_seconds / self._settings.workers,
        )

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Begin no run inside; wait for those that run, but not for long ones."""
        with self._changed:
            self._is_paused = True
            self._changed.wait_for(lambda: not self._running or self._is_stopped, _GAP_SECONDS)
        try:
            yield
        finally:
            with self._changed:
                self._is_paused = False
                self._changed.notify_all()

    def _close_all(self) -> None:
        """End every row: those that run are shown no further, those that wait are not begun."""
        with self._changed:
            queued, running = tuple(self._queue), tuple(self._running)
            self._queue.clear()
            self.metrics.queue.set(0)
        for ticket in queued:
            ticket.row.emit(Finished("cancelled", error="not_ready"))
        for ticket in running:
            ticket.row.emit(Finished("content_filter", outcome="closed", error="canary"))
            ticket.row.cancel()

    def _work(self) -> None:
        while True:
            with self._changed:
                while (not self._queue or self._is_paused) and not self._is_stopped:
                    self._changed.wait()
                if self._is_stopped:
                    return
            self.canary.look()
            with self._changed:
                tickets = [] if self._is_paused else self._next_run()
            if tickets:
                self._run(tickets)

    def _next_run(self) -> list[QueuedRow]:
        """Take the oldest row and those behind it that can run with it."""
        taken: list[QueuedRow] = []
        left: deque[QueuedRow] = deque()
        now = time.monotonic()
        while self._queue:
            ticket = self._queue.popleft()
            if ticket.row.is_cancelled:
                ticket.row.emit(Finished("cancelled"))
            elif not self.canary.is_sound:
                ticket.row.emit(Finished("cancelled", error="not_ready"))
            elif now - ticket.queued_at > self._settings.queue_timeout_s:
                ticket.row.emit(Finished("cancelled", error="queue_timeout"))
                self.metrics.refused.labels("queue_timeout").inc()
            elif len(taken) < self._settings.max_batch and self.engine.admits(
                [t.row for t in taken], ticket.row
            ):
                taken.append(ticket)
            else:
                left.append(ticket)
        self._queue = left
        self._running.update(taken)
        self.metrics.queue.set(len(left))
        self.metrics.running.set(len(self._running))
        return taken

    def _run(self, tickets: Sequence[QueuedRow]) -> None:
        began = time.monotonic()
        for ticket in tickets:
            self.metrics.waited.observe(began - ticket.queued_at)
        self.metrics.batch.observe(len(tickets))
        try:
            self.metrics.note_steps(self.engine.run([ticket.row for ticket in tickets]))
        except Exception:  # an engine must not raise; if one does, the server goes on
            _LOG.exception("the engine raised")
        finally:
            for ticket in tickets:
                ticket.row.emit(Finished("content_filter", outcome="closed", error="lost"))
            with self._changed:
                self._running.difference_update(tickets)
                self.metrics.running.set(len(self._running))
                self._changed.notify_all()
            self._run_seconds += 0.2 * (time.monotonic() - began - self._run_seconds)
