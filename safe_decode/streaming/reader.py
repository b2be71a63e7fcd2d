"""A guarded call whose events are read while it runs, in a thread of its own.

Knows queues, cancellation. Does not know models or what the events say. A stream
that is left early, by `break`, an exception in the reader's code or garbage collection, is
cancelled: the call ends before its next token and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Protocol

from safe_decode.streaming.events import StreamEvent
from safe_decode.streaming.threads import Task

__all__ = ["AsyncGuardedStream", "GuardedStream", "Producer"]


class Producer(Protocol):
    """What runs in the thread of a stream."""

    def __call__(
        self, emit: Callable[[StreamEvent], None], is_cancelled: Callable[[], bool]
    ) -> None:
        """Run a call to its end.

        Args:
            emit: Takes each event as it happens.
            is_cancelled: Asked before each token; once true, the call is to end.
        """
        ...


class _Done:
    """The last thing in a queue: how the producer ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _started(
    producer: Producer, put: Callable[[StreamEvent | _Done], None]
) -> tuple[Task, threading.Event]:
    """Run a producer in a thread; return its task, and what cancels it."""
    cancelled = threading.Event()

    def work() -> None:
        error: BaseException | None = None
        try:
            producer(put, cancelled.is_set)
        except BaseException as caught:  # it is raised again in the reader's thread
            error = caught
        put(_Done(error))

    task = Task(work)
    task.start()
    return task, cancelled


class GuardedStream(Iterator[StreamEvent]):
    """The events of one call; also a context manager that cancels on the way out.

    Made by `SafeDecoder.stream`. It may be iterated once. An error of the call is raised by
    `next`.

    Args:
        producer: Runs the call.
    """

    def __init__(self, producer: Producer) -> None:
        self._events: queue.SimpleQueue[StreamEvent | _Done] = queue.SimpleQueue()
        self._is_over = False
        # The thread holds the queue, not the stream: a forgotten stream is collected.
        self._task, self._cancelled = _started(producer, self._events.put)
        self._finalizer = weakref.finalize(self, self._cancelled.set)

    def __iter__(self) -> GuardedStream:
        return self

    def __next__(self) -> StreamEvent:
        """Wait for the next event."""
        if self._is_over:
            raise StopIteration
        event = self._events.get()
        if not isinstance(event, _Done):
            return event
        self._is_over = True
        self._task.join()
        if event.error is not None:
            raise event.error
        raise StopIteration

    def cancel(self) -> None:
        """End the call before its next token; returns at once and may be called twice.

        Rows that have not ended yet end with `Ended(finish_reason="cancelled")`, which the
        iterator still yields.
        """
        self._cancelled.set()

    def close(self) -> None:
        """Cancel, and wait until the model is free again and no hook is left."""
        self.cancel()
        self._task.join()

    def __enter__(self) -> GuardedStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncGuardedStream(AsyncIterator[StreamEvent]):
    """`GuardedStream` for asyncio: the model runs in a thread, the event loop stays free.

    Made by `SafeDecoder.astream` inside a running event loop. Cancelling the task that
    reads it cancels the call.

    Args:
        producer: Runs the call.
    """

    def __init__(self, producer: Producer) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[StreamEvent | _Done] = asyncio.Queue()
        self._is_over = False
        self._task, self._cancelled = _started(producer, _put_into(self._loop, self._events))
        self._finalizer = weakref.finalize(self, self._cancelled.set)

    def __aiter__(self) -> AsyncGuardedStream:
        return self

    async def __anext__(self) -> StreamEvent:
        """Wait for the next event."""
        if self._is_over:
            raise StopAsyncIteration
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if not isinstance(event, _Done):
            return event
        self._is_over = True
        if event.error is not None:
            raise event.error
        raise StopAsyncIteration

    def cancel(self) -> None:
        """See `GuardedStream.cancel`."""
        self._cancelled.set()

    async def aclose(self) -> None:
        """Cancel, and wait until the model is free again and no hook is left."""
        self.cancel()
        await asyncio.to_thread(self._task.join)

    async def __aenter__(self) -> AsyncGuardedStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


def _put_into(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[StreamEvent | _Done]
) -> Callable[[StreamEvent | _Done], None]:
    def put(event: StreamEvent | _Done) -> None:
        # A closed loop has no reader: its stream was cancelled or is garbage.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    return put
