"""How long answers in flight may still take: their own limit, a reader who leaves, the end.

Knows clocks and tasks. Does not know what is answered. An answer whose time is over is not cut:
what waits on the upstream is told, and the reader gets the proper end of a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from safe_decode.serving.middleware.gate import Receive
from safe_decode.serving.schemas.errors import ApiError

__all__ = ["Deadline", "Deadlines"]


class Deadline:
    """When one answer must have come.

    Args:
        at: By the clock of the event loop.

    Attributes:
        cut_by: Why it was brought forward: the reader left, or the proxy ends; None: it was not.
    """

    def __init__(self, at: float) -> None:
        self.cut_by: Literal["reader", "end"] | None = None
        self._at = at
        self._active: asyncio.Timeout | None = None

    @asynccontextmanager
    async def within(self) -> AsyncIterator[None]:
        """Run what waits on the upstream or its reader.

        Raises:
            TimeoutError: The time is over.
        """
        async with asyncio.timeout_at(self._at) as active:
            self._active = active
            try:
                yield
            finally:
                self._active = None

    def refusal(self) -> ApiError | None:
        """Return what a reader is told whose answer was cut before it began; None: it was not."""
        if self.cut_by == "reader":
            return ApiError(499, "the client has left.", code="client_left")
        return _ending() if self.cut_by == "end" else None

    def cut(self, by: Literal["reader", "end"]) -> None:
        """Let the time be over now."""
        self.cut_by = by
        self._at = asyncio.get_running_loop().time()
        if self._active is not None:
            self._active.reschedule(self._at)


class Deadlines:
    """Those of all answers in flight. Ends as a scheduler does.

    Args:
        seconds: What each answer may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: set[Deadline] = set()
        self._is_draining = False

    @asynccontextmanager
    async def one(self, receive: Receive) -> AsyncIterator[Deadline]:
        """Begin an answer.

        Args:
            receive: Says when the reader leaves; the body has been read.

        Raises:
            ApiError: Nothing new is taken.
        """
        if self._is_draining:
            raise _ending()
        deadline = Deadline(asyncio.get_running_loop().time() + self._seconds)
        self._running.add(deadline)
        watch = asyncio.create_task(_cut_when_gone(deadline, receive))
        try:
            yield deadline
        finally:
            watch.cancel()
            self._running.discard(deadline)

    def begin_drain(self) -> None:
        """Take nothing new from now on."""
        self._is_draining = True

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, let answers end, then bring their deadlines forward.

        Args:
            grace_s: What answers have left to end by themselves.
        """
        self.begin_drain()
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + grace_s
        while self._running and loop.time() < ends_at:
            await asyncio.sleep(0.05)
        for deadline in self._running:
            deadline.cut("end")


async def _cut_when_gone(deadline: Deadline, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    deadline.cut("reader")


def _ending() -> ApiError:
    return ApiError(503, "the proxy is ending.", code="shutting_down", retry_after_s=5.0)
