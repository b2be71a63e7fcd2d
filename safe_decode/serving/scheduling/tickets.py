"""Rows on their way: a ticket each in the queue, and their events on the way back.

Knows the event loop, threads and the order of events. Does not know who runs rows, or when.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from safe_decode.engines.rows import Row, RowRequest
from safe_decode.streaming.events import Finished, RowEvent

__all__ = ["EventBridge", "QueuedRow", "RequestHandle"]


class QueuedRow:
    """A row in the queue or running.

    Attributes:
        row: The row.
        key: Whose it is.
        queued_at: When it was queued, in seconds of a monotonic clock.
    """

    def __init__(self, request: RowRequest, key: str, post: EventBridge, inbox: Inbox) -> None:
        self.key, self.queued_at = key, time.monotonic()
        self.row = Row(request, lambda event: post.send(inbox, (self, event)))


class RequestHandle:
    """The rows of one request, seen from the event loop.

    Args:
        requests: The rows.
        key: Whose they are.
        post: Brings their events.
        timeout_s: After which they are ended.
    """

    def __init__(
        self, requests: Sequence[RowRequest], key: str, post: EventBridge, timeout_s: float
    ) -> None:
        self._inbox: Inbox = asyncio.Queue()
        self._timeout_s = timeout_s
        self.tickets = [QueuedRow(request, key, post, self._inbox) for request in requests]

    async def events(self) -> AsyncGenerator[tuple[int, RowEvent], None]:
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

    async def _next(self, deadline: float) -> tuple[QueuedRow, RowEvent]:
        """Wait for an event, in no task of its own: this is on the way of every token."""
        if self._inbox.empty():
            async with asyncio.timeout_at(deadline):
                return await self._inbox.get()
        return self._inbox.get_nowait()

    def cancel(self) -> None:
        """Let every row end at its next token."""
        for ticket in self.tickets:
            ticket.row.cancel()


Inbox = asyncio.Queue[tuple[QueuedRow, RowEvent]]


class EventBridge:
    """Brings events from any thread to the event loop, many with one wake."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[Inbox, tuple[QueuedRow, RowEvent]]] = deque()
        self._is_called = False

    def send(self, inbox: Inbox, mail: tuple[QueuedRow, RowEvent]) -> None:
        """Bring an event to whoever reads the inbox."""
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
