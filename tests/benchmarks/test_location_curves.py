"""Curves are compared where their task loss is equal; a planted gap is found."""

import numpy as np
import pytest

from benchmarks.location.curves import compare_at_equal_loss, refusal_at, shared_losses

PROMPTS = 40


def curve(slope, *, seed=0, speed=1.0):
    """Loss falls from 3 with the steps; refusal falls by `slope` for each unit of loss."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(PROMPTS)
    points = []
    for step in range(6):
        lost = speed * 0.3 * step
        refusing = round(PROMPTS * (1 - slope * lost))
        refused = np.zeros(PROMPTS, dtype=int)
        refused[order[:refusing]] = 1
        points.append({"step": step, "loss": 3.0 - lost, "refused": refused.tolist()})
    return points


def test_losses_are_those_that_every_run_reaches():
    losses = shared_losses([curve(0.1), curve(0.1, speed=0.5)])
    assert losses[0] < 3.0
    assert losses[-1] == pytest.approx(2.25)
    assert list(losses) == sorted(losses, reverse=True)
    assert not len(shared_losses([curve(0.1, speed=0.0), curve(0.1)]))


def test_refusal_is_read_between_readings():
    run = [
        {"loss": 3.0, "refused": [1, 1]},
        {"loss": 2.0, "refused": [1, 0]},
        {"loss": 2.5, "refused": [0, 0]},
    ]
    at = refusal_at(run, np.asarray([3.0, 2.5, 2.0]))
    assert at.tolist() == [[1, 1], [1, 0.5], [1, 0]]


def test_an_arm_that_only_learns_slower_is_not_credited():
    runs = {
        "free": [curve(0.4, seed=s) for s in range(5)],
        "slow": [curve(0.4, seed=s + 9, speed=0.5) for s in range(5)],
        "kept": [curve(0.1, seed=s + 20) for s in range(5)],
    }
    slow, kept = compare_at_equal_loss(runs, "free")
    assert slow.points[0] == pytest.approx(0, abs=2.5)
    assert slow.points[1] <= 0 <= slow.points[2]
    # At the shared losses, 0.09 to 0.75 below the start, 0.3 of refusal a unit of loss is kept.
    assert kept.points[0] == pytest.approx(
        100 * 0.3 * np.mean(3.0 - np.asarray(kept.losses)), abs=2
    )
    assert kept.points[1] > 0
    assert (slow.seeds, slow.against) == (5, "free")
    nowhere = {"free": [curve(0.1)], "stuck": [curve(0.1, speed=0.0)]}
    assert compare_at_equal_loss(nowhere, "free") == []
