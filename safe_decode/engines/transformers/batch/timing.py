"""What a step takes, and what of it is the guard's own.

Knows the guarded loop's seams. Does not know queues, metrics or rows. Times are the host's: on
an accelerator, work that was only launched is waited for elsewhere. Reading activations, in hooks
within the forward, is not among the guard's own; comparing throughput with it off shows all.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from safe_decode.engines.interface import StepTimes
from safe_decode.engines.transformers.loops.step import StepLoop
from safe_decode.session.session import Session
from safe_decode.session.turns import Turns

__all__ = ["TimedLoop"]


class TimedLoop(StepLoop):
    """A guarded loop that takes the time. Arguments as the loop's.

    Attributes:
        times: Of the steps so far.
    """

    def __init__(self, session: Session, **options: Any) -> None:  # noqa: ANN401 - those of StepLoop
        super().__init__(session, **options)
        self.times = StepTimes()
        self._began = time.perf_counter()
        self._own_seconds = self._told = 0.0

    def on_scores(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Judge, timed."""
        began = time.perf_counter()
        judged = super().on_scores(input_ids, scores)
        self._own_seconds += time.perf_counter() - began
        return judged

    def on_done(self, input_ids: Tensor, done: Tensor) -> Tensor:
        """Take note of the chosen ids, timed; what readers are told is not the guard's."""
        began = time.perf_counter()
        ends = super().on_done(input_ids, done)
        now = time.perf_counter()
        self.times.guard_s.append(self._own_seconds + now - began - self._told)
        self.times.step_s.append(now - self._began)
        self._began, self._own_seconds, self._told = now, 0.0, 0.0
        return ends

    def _tell(self, newest: Tensor, turns: Turns | None) -> None:
        # On a device they are told of a choice before the next score, not behind the choice.
        began = time.perf_counter()
        super()._tell(newest, turns)
        self._told += time.perf_counter() - began

    def _close(self, sequences: Tensor) -> None:
        began = time.perf_counter()
        super()._close(sequences)
        if self.times.guard_s:
            taken = time.perf_counter() - began
            self.times.guard_s[-1] += taken
            self.times.step_s[-1] += taken
