"""Threads that wait for the next call when theirs has ended.

Knows threads. Does not know models or what a call says. A fresh thread pays for its first
tensors: memory of its own, workers of its own. For a small model that is the time of several
tokens, so a thread that has ended its work waits a minute for more. It keeps nothing of the
call meanwhile.
"""

from __future__ import annotations

import contextvars
import os
import queue
import threading
from collections.abc import Callable
from typing import Final

from safe_decode.streaming.openmp import release_workers

__all__ = ["IDLE_NAME", "Task"]

IDLE_NAME: Final = "safe-decode idle"
_WAIT_SECONDS = 60.0
_BUSY_NAME = "safe-decode stream"

_lock = threading.Lock()
_idle: list[_Worker] = []


class Task:
    """Work that runs in a thread of its own, with the context variables of who made it.

    Args:
        work: Called once; it must not raise.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._context: contextvars.Context | None = contextvars.copy_context()
        self._done = threading.Event()

    def start(self) -> None:
        """Give the work to a thread that waits, or to a new one."""
        with _lock:
            worker = _idle.pop() if _idle else None
        if worker is None:
            worker = _Worker()
            worker.start()
        worker.jobs.put(self)
        # Whoever reads mostly waits from here on. It takes a millisecond or two, in which the
        # work gets ready.
        release_workers()

    def join(self) -> None:
        """Wait until the work has ended."""
        self._done.wait()

    def run(self) -> None:
        """Do the work, in the calling thread, and forget it."""
        context, work = self._context, self._work
        assert context is not None and work is not None, "a task runs once"
        self._context = self._work = None
        context.run(work)

    def end(self) -> None:
        """Let those go on who wait for the end."""
        self._done.set()


class _Worker(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name=_BUSY_NAME, daemon=True)
        self.jobs: queue.SimpleQueue[Task] = queue.SimpleQueue()

    def run(self) -> None:
        while (task := self._next()) is not None:
            self.name = _BUSY_NAME
            try:
                task.run()
                # The model may run in another thread next.
                release_workers()
                self.name = IDLE_NAME
                with _lock:
                    _idle.append(self)
            finally:
                task.end()  # whatever failed, nobody waits for ever
            del task

    def _next(self) -> Task | None:
        try:
            return self.jobs.get(timeout=_WAIT_SECONDS)
        except queue.Empty:
            with _lock:
                if self in _idle:
                    _idle.remove(self)
                    return None
        # Taken from the idle ones in this very moment.
        return self.jobs.get()


def _forget() -> None:
    """Start anew in a child process: it has its parent's list and lock, but not the threads."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
