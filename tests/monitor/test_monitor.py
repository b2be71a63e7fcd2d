import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_decode.errors import ConfigurationError
from safe_decode.monitor.monitor import MonitorConfig, RiskMonitor, StatisticKind, reference
from safe_decode.monitor.snapshots import SnapshotRing

logit = st.floats(-50, 50, allow_subnormal=False)


@st.composite
def runs(draw):
    n_heads = draw(st.integers(1, 3))
    batch = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 12), min_size=batch, max_size=batch))
    vector = st.lists(logit, min_size=n_heads, max_size=n_heads)
    kind = draw(st.sampled_from(get_args(StatisticKind)))
    levels = 2 * n_heads if kind == "bank" else n_heads
    places = tuple(sorted(draw(st.sets(st.integers(0, 14), max_size=3))))
    config = MonitorConfig(
        smoothing=draw(st.floats(0.05, 1.0)),
        start=tuple(draw(vector)),
        offset=tuple(draw(st.lists(logit, min_size=levels, max_size=levels))),
        scale=tuple(draw(st.lists(st.floats(0.25, 4), min_size=levels, max_size=levels))),
        low_mark=draw(st.floats(-5, 5, allow_subnormal=False)),
        kind=kind,
        window=draw(st.integers(1, 5)),
        drift=draw(st.floats(0, 2, allow_subnormal=False)),
        hits=draw(st.integers(1, 3)),
        best=draw(st.integers(1, 3)),
        boundary_at=places,
        boundary=tuple(draw(st.lists(logit, min_size=len(places), max_size=len(places)))),
    )
    thresholds = draw(
        st.lists(st.floats(-60, 60, allow_subnormal=False), min_size=batch, max_size=batch)
    )
    rows = [draw(st.lists(vector, min_size=n, max_size=n)) for n in lengths]
    return config, thresholds, rows


@settings(max_examples=100, deadline=None)
@given(runs())
def test_a_path_of_whole_responses_is_what_steps_yield(run):
    config, _, rows = run
    rows = [row for row in rows if row]
    monitor = RiskMonitor(config, math.inf)
    for row in rows:
        logits = torch.tensor([row], requires_grad=True)
        path = monitor.path(logits)
        expected = [step.smoothed for step in reference(config, math.inf, row)]
        assert path.tolist()[0] == pytest.approx(expected, abs=5e-3)
        assert path.requires_grad


@settings(max_examples=150, deadline=None)
@given(runs())
def test_vectorised_monitor_equals_scalar_reference(run):
    config, thresholds, rows = run
    monitor = RiskMonitor(config, torch.tensor(thresholds))
    state = monitor.start(len(rows))
    for step in range(max(map(len, rows), default=0)):
        active = torch.tensor([step < len(row) for row in rows])
        # Frozen rows are fed NaN: freezing must not read them.
        filler = [math.nan] * config.n_heads
        logits = torch.tensor([row[step] if step < len(row) else filler for row in rows])
        state = monitor.step(state, logits, active)
    for i, row in enumerate(rows):
        steps = reference(config, thresholds[i], row)
        assert int(state.step[i]) == len(row)
        assert bool(state.finite[i])
        if not steps:
            assert float(state.statistic[i]) == -math.inf
            continue
        last = steps[-1]
        assert float(state.statistic[i]) == pytest.approx(last.statistic, abs=5e-3)
        assert float(state.smoothed[i]) == pytest.approx(last.smoothed, abs=5e-3)
        if abs(last.statistic - thresholds[i]) > 1e-2:
            assert bool(state.alarm[i]) == last.alarm
        if all(abs(config.value(s.ema) - config.low_mark) > 1e-2 for s in steps):
            assert int(state.clear_point[i]) == last.clear_point


@settings(max_examples=50, deadline=None)
@given(runs())
def test_statistic_never_falls_and_alarm_latches(run):
    config, thresholds, rows = run
    for row, threshold in zip(rows, thresholds, strict=True):
        steps = reference(config, threshold, row)
        for before, after in zip(steps, steps[1:], strict=False):
            assert after.statistic >= before.statistic
            assert after.alarm >= before.alarm


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("kind", get_args(StatisticKind))
def test_non_finite_logit_is_found_on_its_row_only_and_for_good(bad, head, kind):
    n = 4 if kind == "bank" else 2
    config = MonitorConfig(0.5, (0.0,) * 2, (0.0,) * n, (1.0,) * n, 0.0, kind=kind, window=2)
    monitor = RiskMonitor(config, 10.0)
    state = monitor.start(2)
    logits = torch.zeros(2, 2)
    logits[1, head] = bad
    state = monitor.step(state, logits)
    for _ in range(3):  # longer than the window of the mean
        state = monitor.step(state, torch.zeros(2, 2))
    assert state.finite.tolist() == [True, False]
    assert float(state.statistic[0]) == 0.0


def statistics(config, logits):
    return [step.smoothed for step in reference(config, 0.0, [[value] for value in logits])]


def test_each_statistic_is_what_it_says():
    plain = {"smoothing": 1.0, "start": (1.0,), "offset": (0.0,), "scale": (1.0,), "low_mark": 0.0}
    mean = MonitorConfig(**plain, kind="mean", window=3)
    assert statistics(mean, [4, 7, 1, 1]) == [2.0, 4.0, 4.0, 3.0]  # two starts stand before s_0
    cusum = MonitorConfig(**plain, kind="cusum", drift=1.0)
    assert statistics(cusum, [3, 0, 5, 5]) == [1.0, 0.0, 3.0, 6.0]
    shrunk = MonitorConfig(**plain, kind="shrunk", window=2)
    assert statistics(shrunk, [4, 4, 10]) == [2.0, 2.5, 4.0]  # two starts weigh as two logits
    two = {"smoothing": 0.5, "offset": (0.0, 1.0), "scale": (1.0, 2.0)}
    bank = MonitorConfig(**{**plain, **two}, kind="bank", window=2)
    # The mean goes 2, 2.5, 4; the average 2.5, 3.25, 6.625, and counts less 1 and half.
    assert statistics(bank, [4, 4, 10]) == [2.0, 2.5, 4.0]
    assert statistics(bank, [1, 1, 1, 1, 1, 17]) == [1.0] * 5 + [4.0]  # the mean alone: 3
    top = MonitorConfig(**plain, kind="top", window=2, best=2)
    # One window alone is not enough; a start stands for the second, and for what a window lacks.
    assert statistics(top, [5, 5, 1, 1, 9, 9]) == [2.0, 3.0, 3.0, 3.0, 5.0, 7.0]
    twice = MonitorConfig(**plain, hits=2)
    assert statistics(twice, [9, 0, 5, 7]) == [1.0, 0.0, 0.0, 5.0]


def test_hysteresis_never_calls_a_rising_position_clear():
    config = MonitorConfig(1.0, (0.0,), (0.0,), (1.0,), 1.0, hits=3)
    state = RiskMonitor(config, 5.0).start(1)
    for value in (0.0, 9.0, 9.0, 9.0):
        state = RiskMonitor(config, 5.0).step(state, torch.tensor([[value]]))
    assert int(state.clear_point) == 0
    assert bool(state.alarm)


def test_step_is_pure():
    config = MonitorConfig(0.5, (0.0,), (0.0,), (1.0,), 0.0)
    monitor = RiskMonitor(config, 1.0)
    before = monitor.start(3)
    copies = [field.clone() for field in before]
    monitor.step(before, torch.full((3, 1), 9.0), torch.tensor([True, False, True]))
    assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))


def test_ring_holds_hold_back_plus_one_snapshots_and_finds_a_row_by_its_step():
    config = MonitorConfig(1.0, (0.0,), (0.0,), (1.0,), 0.0)
    monitor, ring = RiskMonitor(config, 1e9), SnapshotRing(3)
    state = monitor.start(1)
    for value in range(1, 6):
        state = monitor.step(state, torch.tensor([[float(value)]]))
        ring.push(state)
    assert len(ring) == 3
    assert ring.row_at(0, 2) is None
    found = ring.row_at(0, 4)
    assert found is not None and float(found.ema) == 4.0


@pytest.mark.parametrize(
    "change",
    [
        {"smoothing": 0.0},
        {"smoothing": 1.5},
        {"start": ()},
        {"scale": (0.0,)},
        {"offset": (math.nan,)},
        {"start": (0.0, 1.0)},
        {"kind": "median"},
        {"window": 0},
        {"hits": 0},
        {"drift": math.inf},
    ],
)
def test_bad_configuration_is_refused_by_name(change):
    good = {"smoothing": 0.5, "start": (0.0,), "offset": (0.0,), "scale": (1.0,), "low_mark": 0.0}
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        MonitorConfig(**{**good, **change})


def test_thresholds_of_another_batch_are_refused():
    config = MonitorConfig(0.5, (0.0,), (0.0,), (1.0,), 0.0)
    with pytest.raises(ConfigurationError, match="3 rows for a batch of 2"):
        RiskMonitor(config, torch.zeros(3)).start(2)
    with pytest.raises(ConfigurationError, match="NaN"):
        RiskMonitor(config, math.nan)


def test_the_boundary_depends_on_how_much_was_said_and_on_nothing_else():
    plain = {"smoothing": 1.0, "start": (0.0,), "offset": (0.0,), "scale": (1.0,), "low_mark": 0.0}
    config = MonitorConfig(**plain, boundary_at=(1, 7), boundary=(1.0, 3.0))
    table = config.boundary_table
    assert table[:2] == (1.0, 1.0) and table[3] == pytest.approx(2.0) and table[7] == 3.0
    assert len(table) == 8
    smoothed = [step.smoothed for step in reference(config, 0.0, [[5.0]] * 12)]
    assert smoothed == pytest.approx([5.0 - table[min(t, 7)] for t in range(12)])
    assert MonitorConfig(**plain).boundary_table == ()
    for wrong in ({"boundary_at": (3, 3), "boundary": (1.0, 2.0)}, {"boundary_at": (1,)}):
        with pytest.raises(ConfigurationError, match="boundary_at="):
            MonitorConfig(**plain, **wrong)
    with pytest.raises(ConfigurationError, match="must be finite"):
        MonitorConfig(**plain, boundary_at=(1,), boundary=(math.nan,))
