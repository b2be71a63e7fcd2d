"""Comparing curves at equal task loss, with a hierarchical bootstrap.

A frozen run that learns less also forgets less, so arms are compared where their task loss is
equal: refusal is read off each run's curve at the losses that all runs reach. The bootstrap
draws seeds first and prompts within them, since prompts of one run share its seed.

Knows curves of readings. Does not know models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Gap", "compare_at_equal_loss", "refusal_at", "shared_losses"]

_LEVELS = 8
_RESAMPLES = 2_000

Curve = Sequence[Mapping[str, Any]]
"""Readings with `loss` and `refused`, a 0 or 1 a prompt, in the order of training."""


@dataclass(frozen=True)
class Gap:
    """How much more an arm refuses than another, in points.

    Attributes:
        arm: The first.
        against: The second.
        losses: Task losses compared at, highest first.
        points: Mean over losses of the difference, with a 95 % interval: mean, low, high.
        by_loss: The difference at each loss.
        seeds: Of each arm.
    """

    arm: str
    against: str
    losses: tuple[float, ...]
    points: tuple[float, float, float]
    by_loss: tuple[float, ...]
    seeds: int


def shared_losses(runs: Sequence[Curve]) -> NDArray[np.float64]:
    """Return losses that every run has reached, evenly spaced, highest first; [] if none."""
    high = min(float(run[0]["loss"]) for run in runs)
    low = max(min(float(point["loss"]) for point in run) for run in runs)
    if not low < high:
        return np.zeros(0)
    return np.linspace(high, low, _LEVELS + 1)[1:]


def refusal_at(run: Curve, losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return refusal of each prompt where the run first reaches each loss, [losses, prompts].

    Between two readings, a line; the curve is taken up to the reading of least loss.
    """
    values = np.asarray([point["loss"] for point in run], dtype=np.float64)
    refused = np.asarray([point["refused"] for point in run], dtype=np.float64)
    reached = []
    for loss in losses:
        at = int(np.argmax(values <= loss))
        if at == 0:
            reached.append(refused[0])
            continue
        share = (values[at - 1] - loss) / (values[at - 1] - values[at])
        reached.append((1 - share) * refused[at - 1] + share * refused[at])
    return np.stack(reached)


def compare_at_equal_loss(
    runs: Mapping[str, Sequence[Curve]], against: str, *, seed: int = 0
) -> list[Gap]:
    """Compare every arm with one of them, at losses that all runs of all arms reach.

    Args:
        runs: Curves by arm, one a seed, in the same order of seeds.
        against: The arm compared with.
        seed: Of the bootstrap.
    """
    losses = shared_losses([run for arm in runs.values() for run in arm])
    if not len(losses):
        return []
    found = {arm: np.stack([refusal_at(r, losses) for r in own]) for arm, own in runs.items()}
    rng = np.random.default_rng(seed)
    return [
        _gap(arm, against, losses, found[arm] - found[against], rng)
        for arm in runs
        if arm != against
    ]


def _gap(
    arm: str,
    against: str,
    losses: NDArray[np.float64],
    difference: NDArray[np.float64],
    rng: np.random.Generator,
) -> Gap:
    seeds, _, prompts = difference.shape
    per_prompt = difference.mean(axis=1)  # [seeds, prompts]
    drawn = np.zeros(_RESAMPLES)
    for number in range(_RESAMPLES):
        rows = rng.integers(seeds, size=(seeds, 1))
        drawn[number] = per_prompt[rows, rng.integers(prompts, size=(seeds, prompts))].mean()
    low, high = np.quantile(drawn, (0.025, 0.975))
    points = (100 * float(per_prompt.mean()), 100 * float(low), 100 * float(high))
    by_loss = tuple((100 * difference.mean(axis=(0, 2))).tolist())
    return Gap(arm, against, tuple(losses.tolist()), points, by_loss, seeds)
