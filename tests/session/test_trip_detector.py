"""The short way of a step says what the monitor says, whatever comes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_decode.monitor.monitor import MonitorConfig, MonitorState, RiskMonitor
from safe_decode.policy.policy import Policy
from safe_decode.session.trip_detector import TripDetector

CONFIGS = (
    MonitorConfig(0.4, (0.1,), (-0.3,), (1.7,), -0.2),
    MonitorConfig(1.0, (0.0, 0.5), (0.2, -0.1), (0.8, 2.0), 0.1),
    MonitorConfig(1.0, (0.1,), (-0.3,), (1.7,), -0.2, kind="shrunk", window=3),
    MonitorConfig(1.0, (0.0, 0.5), (0.2, -0.1), (0.8, 2.0), 0.1, kind="shrunk", window=1),
    MonitorConfig(0.5, (0.1,), (-0.3, 0.2), (1.7, 0.9), -0.2, kind="bank", window=3),
)
logit = st.one_of(
    st.floats(-9, 9, allow_subnormal=False), st.sampled_from([math.nan, math.inf, -math.inf])
)


@st.composite
def runs(draw):
    config = draw(st.sampled_from(CONFIGS))
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    row = st.lists(logit, min_size=config.n_heads, max_size=config.n_heads)
    steps = draw(st.lists(st.lists(row, min_size=batch, max_size=batch), min_size=length))
    mask = st.lists(st.booleans(), min_size=batch, max_size=batch)
    masks = draw(st.lists(st.none() | mask, min_size=len(steps), max_size=len(steps)))
    thresholds = draw(
        st.lists(
            st.sampled_from([-30.0, -1.0, 0.5, 2.0, 8.0, math.inf]),
            min_size=batch,
            max_size=batch,
        )
    )
    return config, thresholds, steps, masks


def same(one: MonitorState, other: MonitorState) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


@settings(max_examples=120, deadline=None)
@given(runs(), st.sampled_from(["close", "allow"]), st.booleans(), st.booleans())
def test_watch_equals_the_monitor_step_by_step(run, on_error, reads_on_host, keeps_levels):
    config, thresholds, steps, masks = run
    policy = Policy(redirect="refuse", on_error=on_error, holdback_tokens=2)
    monitor = RiskMonitor(config, torch.tensor(thresholds))
    wanted = monitor.start(len(thresholds))
    watch = TripDetector(monitor, policy, wanted)
    watch._reads_on_host = reads_on_host  # the way of an accelerator, on the CPU
    watch._keeps_levels = keeps_levels  # as for statistics that are stepped in full
    shown = []
    for logits, mask in zip(steps, masks, strict=True):
        active = None if mask is None else torch.tensor(mask)
        wanted = monitor.step(wanted, torch.tensor(logits), active)
        watch.step(torch.tensor(logits), active)
        shown.append((wanted.smoothed, wanted.statistic))
        trips = policy.trips(wanted.alarm, wanted.finite)
        consumed = wanted.step > 0
        # A row that consumed nothing yet stands where it starts, which may lie over a bound.
        assert torch.equal(watch.trips()[consumed], trips[consumed])
    assert same(watch.state, wanted)
    assert [watch.consumed(row) for row in range(len(thresholds))] == wanted.step.tolist()
    trail = watch.trail()
    for index, (smoothed, statistic) in enumerate(shown):
        active = trail.active[index]
        for mine, theirs in ((trail.smoothed, smoothed), (trail.statistic, statistic)):
            torch.testing.assert_close(
                mine[index][active], theirs[active], rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("value", [0.49999, 0.5, 0.50001])
def test_a_value_beside_the_threshold_is_decided_by_the_monitor(value):
    config = MonitorConfig(1.0, (0.0,), (3.0,), (7.0,), 0.0)
    monitor = RiskMonitor(config, 0.5)
    watch = TripDetector(monitor, Policy(), monitor.start(1))
    logits = torch.tensor([[3.0 + 7.0 * value]])
    watch.step(logits)
    assert torch.equal(watch.trips(), monitor.step(monitor.start(1), logits).alarm)


def test_nothing_new_is_handed_out_while_nothing_trips():
    monitor = RiskMonitor(CONFIGS[0], 3.0)
    watch = TripDetector(monitor, Policy(), monitor.start(2))
    quiet = watch.trips()
    for _ in range(3):
        watch.step(torch.zeros(2, 1))
        assert watch.trips() is quiet
    watch.step(torch.tensor([[99.0], [0.0]]))
    assert watch.trips().tolist() == [True, False]
    loud = watch.trips()
    watch.step(torch.tensor([[99.0], [0.0]]))
    assert watch.trips() is loud


def test_trips_of_a_stretch_look_at_every_score_of_it():
    monitor = RiskMonitor(CONFIGS[0], 3.0)
    watch = TripDetector(monitor, Policy(), monitor.start(1))
    for value in (0.0, 99.0, -99.0, -99.0):
        watch.step(torch.tensor([[value]]))
    assert watch.trips(4).tolist() == [True]


def test_snapshots_are_the_states_a_row_went_through():
    monitor = RiskMonitor(CONFIGS[0], 30.0)
    watch = TripDetector(monitor, Policy(holdback_tokens=2), monitor.start(1))
    states = [watch.state]
    for value in range(5):
        watch.step(torch.tensor([[float(value)]]))
        states.append(monitor.step(states[-1], torch.tensor([[float(value)]])))
    assert same(watch.state, states[-1])
    found = watch.snapshot(0, 4)
    assert found is not None
    assert same(found, states[4])
    assert watch.snapshot(0, 1) is None
