"""Who runs when: a bounded queue in front of the engine, and events on their way back.

Rows join the next run, not a running one: a run is one call of the guarded loop, which holds
the engine's laws, and rows cannot enter it without copying that loop. Each worker takes the
oldest rows that admit each other as soon as it is free; a row's end is told at once.

Knows queues, threads, limits and the event loop. Does not know models or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from safe_decode.errors import CanaryError
from safe_decode.serving.engine import Engine
from safe_decode.serving.failures import ApiError
from safe_decode.serving.metrics import Metrics
from safe_decode.serving.rows import Event, Finished, Row, RowRequest
from safe_decode.serving.settings import ServeSettings
from safe_decode.workers import release_workers

__all__ = ["Scheduler", "Ticket", "Tickets"]

_LOG = logging.getLogger("safe_decode.serving")


class Ticket:
    """A row in the queue or running.

    Attributes:
        row: The row.
        key: Whose it is.
        queued_at: When it was queued, in seconds of a monotonic clock.
    """

    def __init__(self, request: RowRequest, key: str, post: _Post, inbox: Inbox) -> None:
        self.key, self.queued_at = key, time.monotonic()
        self.row = Row(request, lambda event: post.send(inbox, (self, event)))


class Tickets:
    """The rows of one request, seen from the event loop.

    Args:
        requests: The rows.
        key: Whose they are.
        post: Brings their events.
        timeout_s: After which they are ended.
    """

    def __init__(
        self, requests: Sequence[RowRequest], key: str, post: _Post, timeout_s: float
    ) -> None:
        self._inbox: Inbox = asyncio.Queue()
        self._timeout_s = timeout_s
        self.tickets = [Ticket(request, key, post, self._inbox) for request in requests]

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield the rows' events with their indices, until all have ended.

        A reader who leaves cancels what is left.
        """
        left = dict(zip(self.tickets, range(len(self.tickets)), strict=True))
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            while left:
                try:
                    ticket, event = await self._next(deadline)
                except TimeoutError:
                    for index in left.values():
                        yield index, Finished("cancelled", error="timeout")
                    return
                if ticket in left:
                    yield left[ticket], event
                    if isinstance(event, Finished):
                        del left[ticket]
        finally:
            self.cancel()

    async def _next(self, deadline: float) -> tuple[Ticket, Event]:
        """Wait for an event, in no task of its own: this is on the way of every token."""
        if self._inbox.empty():
            async with asyncio.timeout_at(deadline):
                return await self._inbox.get()
        return self._inbox.get_nowait()

    def cancel(self) -> None:
        """Let every row end at its next token."""
        for ticket in self.tickets:
            ticket.row.cancel()


Inbox = asyncio.Queue[tuple[Ticket, Event]]


class _Post:
    """Brings events from any thread to the event loop, many with one wake."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[Inbox, tuple[Ticket, Event]]] = deque()
        self._is_called = False

    def send(self, inbox: Inbox, mail: tuple[Ticket, Event]) -> None:
        self._waiting.append((inbox, mail))
        if self._is_called:
            return
        self._is_called = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: there is no reader any more
            self._waiting.clear()

    def _deliver(self) -> None:
        # Before the queue is emptied: what is appended from here on calls again.
        self._is_called = False
        while self._waiting:
            inbox, mail = self._waiting.popleft()
            inbox.put_nowait(mail)


class Scheduler:
    """Queues rows and runs them.

    Args:
        engine: Runs them.
        settings: Limits.
        metrics: Counts.
    """

    def __init__(self, engine: Engine, settings: ServeSettings, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self.is_ready = False
        self.why_not_ready = "the canary has not run yet"
        self._settings = settings
        self._queue: deque[Ticket] = deque()
        self._running: set[Ticket] = set()
        self._changed = threading.Condition()
        self._is_draining = self._is_stopped = False
        self._threads: list[threading.Thread] = []
        self._post: _Post | None = None
        self._run_seconds = 1.0

    @property
    def is_serving(self) -> bool:
        """Say whether rows are taken."""
        return self.is_ready and not self._is_draining

    @property
    def in_flight(self) -> int:
        """Count the rows that wait or run."""
        return len(self._queue) + len(self._running)

    def start(self) -> None:
        """Begin; on the event loop. The canary decides whether anything is served."""
        self._post = _Post(asyncio.get_running_loop())
        try:
            self.metrics.canary.set(self.engine.check())
        except CanaryError as error:
            self.why_not_ready = str(error)
            _LOG.error("the canary failed, nothing is served: %s", error)
            return
        release_workers()  # of the event loop, which computes no more
        self.is_ready = True
        self.metrics.ready.set(1)
        for number in range(self._settings.workers):
            thread = threading.Thread(
                target=self._work, name=f"safe-decode-run-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def submit(self, requests: Sequence[RowRequest], key: str) -> Tickets:
        """Queue the rows of one request, all or none.

        Args:
            requests: The rows.
            key: Whose they are.

        Raises:
            ApiError: 503 while starting, refused by the canary or ending; 429 with a full
                queue, or too many rows of one key.
        """
        if not self.is_ready or self._is_draining or self._post is None:
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
            tickets = Tickets(requests, key, self._post, self._settings.request_timeout_s)
            self._queue.extend(tickets.tickets)
            self.metrics.queue.set(len(self._queue))
            self._changed.notify()
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

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._is_stopped:
                    self._changed.wait()
                if self._is_stopped:
                    return
                tickets = self._next_run()
            if tickets:
                self._run(tickets)

    def _next_run(self) -> list[Ticket]:
        """Take the oldest row and those behind it that can run with it."""
        taken: list[Ticket] = []
        left: deque[Ticket] = deque()
        now = time.monotonic()
        while self._queue:
            ticket = self._queue.popleft()
            if ticket.row.is_cancelled:
                ticket.row.emit(Finished("cancelled"))
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

    def _run(self, tickets: Sequence[Ticket]) -> None:
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
            self._run_seconds += 0.2 * (time.monotonic() - began - self._run_seconds)
