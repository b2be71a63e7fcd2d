"""The statistic of finished responses equals what the monitor says step by step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from probes.calibration.statistic import first_trips, maxima, smoothed_paths
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import NonFiniteError
from safe_decode.monitor.monitor import MonitorConfig, RiskMonitor, reference
from safe_decode.testing.bundles import bundle_for, threshold_between

CONFIG = MonitorConfig(0.3, (-1.0, 0.5), (0.2, -0.3), (1.5, 0.7), low_mark=0.0)


def streams(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 30, (n,), generator=generator).tolist()
    return [torch.randn(size, 2, generator=generator) * 3 for size in sizes]


def test_paths_equal_the_scalar_reference():
    for logits, path in zip(streams(), smoothed_paths(streams(), CONFIG), strict=True):
        expected = [step.smoothed for step in reference(CONFIG, 0.0, logits.tolist())]
        np.testing.assert_allclose(path, expected, rtol=1e-5, atol=1e-5)


def test_paths_are_bit_for_bit_those_of_the_running_monitor():
    logits = streams(5)
    for row, path in zip(logits, smoothed_paths(logits, CONFIG), strict=True):
        monitor = RiskMonitor(CONFIG, 0.5)
        state = monitor.start(1)
        for step, expected in zip(row, path, strict=True):
            state = monitor.step(state, step[None])
            assert state.smoothed.item() == expected
        assert state.statistic.item() == maxima([path])[0]


def test_trips_are_the_first_scores_above_the_threshold():
    paths = [np.array([3, 0, 2, 5], np.float32), np.array([0, 1], np.float32)]
    assert first_trips(paths, 1.0) == [0, None]
    assert first_trips(paths, 1.0, skip_prompt=True) == [2, None]
    assert first_trips(paths, 0.99, skip_prompt=True) == [2, 1]
    assert paths[0][0] == 3


def test_a_logit_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="a logit is NaN or infinite"):
        smoothed_paths([torch.tensor([[0.0, float("inf")]])], CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "mean", "window": 3},
        {"kind": "cusum", "drift": 0.1},
        {"kind": "shrunk", "window": 4},
        {"kind": "bank", "window": 4, "offset": (0.0, 0.1), "scale": (1.0, 0.5)},
        {"kind": "top", "window": 3, "best": 2},
        {"hits": 3},
        {"kind": "mean", "window": 4, "hits": 2},
    ],
)
@pytest.mark.parametrize("redirect", ["flag", "refuse"])
def test_serving_compares_the_statistic_that_was_certified(llama, tokenizer, changes, redirect):
    prompts = ["hello", "a much longer prompt than that", "x", "two words"]

    def served(threshold, how):
        bundle = bundle_for(llama, tokenizer, threshold=threshold, holdback=2)
        monitor = replace(bundle.monitor, **changes)
        decoder = SafeDecoder(llama, tokenizer, replace(bundle, monitor=monitor), redirect=how)
        return monitor, decoder.generate(prompts, prefill="Sure", max_new_tokens=16).traces

    _, free = served(1e9, "flag")
    tops = [max(step.statistic for step in trace.steps) for trace in free]
    threshold = threshold_between(tops)
    monitor, traces = served(threshold, redirect)
    for trace in traces:
        steps = reference(monitor, threshold, trace.logits_of())
        found = [step.statistic for step in trace.steps if step.attempt == 0]
        np.testing.assert_allclose(found, [step.statistic for step in steps], rtol=1e-4, atol=1e-4)
        alarms = [number for number, step in enumerate(steps) if step.alarm]
        assert (alarms[0] if alarms else None) == trace.end.trip_step
    assert {trace.tripped for trace in traces} == {True, False}
