"""The canary, again and again: whether the model is still the one that was certified.

Knows the engine's check, its interval and whom to tell. Does not know rows, queues or HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from safe_decode.engines.interface import Engine
from safe_decode.errors import SafeDecodeError
from safe_decode.serving.operations.metrics import Metrics
from safe_decode.streaming.openmp import release_workers

__all__ = ["CanaryWatch"]

_LOG = logging.getLogger("safe_decode.serving")


class CanaryWatch:
    """Runs the canary at an interval, in a thread of its own, and when the model has changed.

    Once a canary has failed nothing is sound until a later one passes.

    Args:
        engine: Has the canary.
        metrics: Counts.
        every_s: The interval.
        pause: Holds new runs back while it is entered, so that the canary runs between batches.
        on_failure: Called when a canary has failed, on the thread that ran it.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        *,
        every_s: float,
        pause: Callable[[], AbstractContextManager[None]],
        on_failure: Callable[[], None],
    ) -> None:
        self.is_sound = False
        self._engine, self._metrics, self._every_s = engine, metrics, every_s
        self._pause, self._on_failure = pause, on_failure
        self._turn = threading.Lock()
        self._is_over = threading.Event()

    def start(self) -> None:
        """Begin to repeat it."""
        threading.Thread(target=self._repeat, name="safe-decode-canary", daemon=True).start()

    def stop(self) -> None:
        """Repeat it no more."""
        self._is_over.set()

    def check(self) -> bool:
        """Run the canary now; blocks.

        Returns:
            Whether it has passed.
        """
        with self._turn:
            try:
                difference = self._engine.check()
            except Exception as error:  # whatever fails, nothing shows that the guard is sound
                self._fail(error)
            else:
                self._pass(difference)
            return self.is_sound

    def look(self) -> None:
        """Run the canary now if the engine says that its model has changed, or cannot say."""
        try:
            has_changed = self._engine.has_changed()
        except Exception:  # whatever it is, the canary tells
            _LOG.exception("the engine cannot say whether its model has changed")
            has_changed = True
        if has_changed:
            self.check()

    def _repeat(self) -> None:
        while not self._is_over.wait(self._every_s):
            with self._pause():
                self.check()
            release_workers()  # of this thread, which computes nothing until the next time

    def _pass(self, difference: float) -> None:
        self._metrics.canary_runs.labels("passed").inc()
        self._metrics.canary.set(difference)
        self._metrics.ready.set(1)
        if not self.is_sound:
            _LOG.info("the canary has passed; rows are taken")
        self.is_sound = True

    def _fail(self, error: Exception) -> None:
        self._metrics.canary_runs.labels("failed").inc()
        self._metrics.ready.set(0)
        self.is_sound = False
        why = error if isinstance(error, SafeDecodeError) else type(error).__name__
        _LOG.error("the canary failed, nothing is served: %s", why)
        self._on_failure()
