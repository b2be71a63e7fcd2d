"""The monitor's statistic over finished responses: one path of smoothed values a response.

The runtime's own monitor is stepped, in float32, so a threshold set here is compared at
serving with numbers made by the same arithmetic.

Knows logits and monitor configurations. Does not know thresholds' origin, labels or text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safe_decode.errors import NonFiniteError
from safe_decode.monitor.monitor import MonitorConfig, RiskMonitor

__all__ = ["first_trips", "maxima", "smoothed_paths"]

_ROWS_AT_ONCE = 1024  # bounds the padded block of logits


def smoothed_paths(logits: Sequence[Tensor], config: MonitorConfig) -> list[NDArray[np.float32]]:
    """Smooth the logits of whole responses.

    Args:
        logits: [T + 1, K] float32 each, in the order of the scores s_0 .. s_T.
        config: Of the monitor; its low mark is not used.

    Returns:
        [T + 1] float32 each, before any maximum over time.

    Raises:
        NonFiniteError: A logit is NaN or infinite.
    """
    paths: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(logits)
    # By length, so that a block is hardly wider than its rows.
    order = sorted(range(len(logits)), key=lambda row: len(logits[row]))
    for begin in range(0, len(order), _ROWS_AT_ONCE):
        rows = order[begin : begin + _ROWS_AT_ONCE]
        block = _smooth_block([logits[row] for row in rows], config)
        for row, path in zip(rows, block, strict=True):
            paths[row] = path
    return paths


def maxima(paths: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Return the running maximum at the end of each path, [n], the calibrated statistic."""
    return np.asarray([path.max() for path in paths], dtype=np.float64)


def first_trips(
    paths: Sequence[NDArray[np.float32]], threshold: float, *, skip_prompt: bool = False
) -> list[int | None]:
    """Find the first score above the threshold in each path; None where there is none.

    Args:
        paths: [T + 1] each.
        threshold: Tripped iff above it.
        skip_prompt: Leave s_0, which judges the prompt alone, out of account.
    """
    trips: list[int | None] = []
    for path in paths:
        above = path > threshold
        if skip_prompt:
            above[0] = False
        trips.append(int(above.argmax()) if above.any() else None)
    return trips


def _smooth_block(logits: Sequence[Tensor], config: MonitorConfig) -> list[NDArray[np.float32]]:
    if not all(bool(torch.isfinite(row).all()) for row in logits):
        raise NonFiniteError("a logit is NaN or infinite; the probe or the model is broken.")
    padded = torch.nn.utils.rnn.pad_sequence(list(logits), batch_first=True)
    monitor = RiskMonitor(config, float("inf"))
    state = monitor.start(len(logits))
    steps = []
    for step in padded.unbind(dim=1):
        # Rows that have ended go on over padding; their tail is cut off below.
        state = monitor.step(state, step)
        steps.append(state.smoothed)
    smoothed = torch.stack(steps, dim=1).numpy()
    return [path[: len(row)].astype(np.float32) for path, row in zip(smoothed, logits, strict=True)]
