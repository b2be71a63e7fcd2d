"""Where each microsecond goes: the guard's own stages, timed inside a running `generate`.

Between two calls of a stage the whole model runs, so caches are as cold as they are in use;
timed in a loop of its own, every stage would look several times cheaper. The clock around each
stage costs about 0.2 us, which is counted in.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np

from safe_decode.activations.recorder import ForwardRecorder
from safe_decode.bench.arms import Load, options_of
from safe_decode.bench.models import Subject
from safe_decode.engines.transformers.loops.step import StepLoop
from safe_decode.session.trip_detector import TripDetector

__all__ = ["stage_rows"]

_STAGES: dict[str, tuple[Any, str]] = {
    "hooks": (ForwardRecorder, "hear"),
    "features": (ForwardRecorder, "take"),
    "monitor: level": (TripDetector, "step"),
    "monitor: bounds": (TripDetector, "trips"),
    "all before the choice": (StepLoop, "on_scores"),
    "all after the choice": (StepLoop, "on_done"),
}


def stage_rows(subject: Subject, load: Load, *, calls: int) -> list[dict[str, object]]:
    """Time the stages over several calls: a row each.

    Args:
        subject: Model and bundle.
        load: Batch, context, length.
        calls: Of `generate`, after one that warms up.
    """
    decoder, options = subject.decoder(), options_of(subject, load)
    decoder.generate(**options)
    with _timed() as taken:
        for _ in range(calls):
            decoder.generate(**options)
    n_tokens = calls * load.new_tokens
    return [
        {
            "stage": name,
            "batch": load.batch,
            "calls a token": round(len(taken[name]) / n_tokens, 2),
            "median us a call": round(float(np.median(taken[name])) / 1e3, 2),
            "median us a token": round(
                float(np.median(taken[name])) * len(taken[name]) / n_tokens / 1e3, 1
            ),
        }
        for name in _STAGES
    ]


@contextmanager
def _timed() -> Iterator[dict[str, list[int]]]:
    taken: dict[str, list[int]] = defaultdict(list)
    with ExitStack() as stack:
        for name, (owner, method) in _STAGES.items():
            timed = _clocked(getattr(owner, method), taken[name])
            stack.enter_context(mock.patch.object(owner, method, timed))
        yield taken


def _clocked(whole: Callable[..., Any], taken: list[int]) -> Callable[..., Any]:
    def clocked(*args: object, **kwargs: object) -> object:
        began = time.perf_counter_ns()
        try:
            return whole(*args, **kwargs)
        finally:
            taken.append(time.perf_counter_ns() - began)

    return clocked
