"""Progress for logs and pipes: a plain line every half minute, and none in a short run.

Knows clocks and how a line reads. Does not know terminals, where a bar or a spinner is shown
instead, or what is being done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["EVERY_S", "PlainProgress", "beating"]

EVERY_S = 30.0
"""Seconds between two lines, and what a run must exceed for its end to be told."""


class PlainProgress:
    """Tells how far one piece of work has come; several threads may report.

    Args:
        label: What is being done.
        write: Takes each line, without its end.
        total: Units of work; None where their number is unknown.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        label: str,
        write: Callable[[str], None],
        *,
        total: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._write, self._total, self._clock = label, write, total, clock
        self._lock = threading.Lock()
        self._begun = self._told = clock()
        self._done = 0

    def advance(self, done: int) -> None:
        """Count `done` more units, and tell if a line is due."""
        with self._lock:
            self._done += done
        self.tell_if_due()

    def tell_if_due(self) -> None:
        """Write a line if the last one, or the beginning, is half a minute ago."""
        with self._lock:
            now = self._clock()
            if now - self._told < EVERY_S:
                return
            self._told = now
            counted = "" if self._total is None else f" {self._done:,} of {self._total:,},"
            line = f"{self._label}:{counted} {_duration(now - self._begun)} so far"
        self._write(line)

    def finish(self) -> None:
        """Say that the work is done, if it took longer than half a minute."""
        took = self._clock() - self._begun
        if took > EVERY_S:
            self._write(f"{self._label}: done in {_duration(took)}")


@contextmanager
def beating(told: PlainProgress, *, every_s: float = EVERY_S) -> Iterator[None]:
    """Tell of work that reports nothing itself, from a thread that ends with the block.

    Args:
        told: Finished at the end, unless the work fails.
        every_s: Seconds between two looks at the clock.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every_s):
            told.tell_if_due()

    thread = threading.Thread(target=beat, name="safe-decode-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    told.finish()


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
