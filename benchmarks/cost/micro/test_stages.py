"""Each stage of a step by itself, with warm caches: for comparing commits, not for publishing.

`python -m pytest benchmarks/cost/micro --benchmark-autosave --benchmark-compare` says what changed.
In use, with the whole model between two calls, every stage costs several times more; see
docs/results/cost.md.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from safe_decode.activations.recorder import ForwardRecorder
from safe_decode.activations.site import Site
from safe_decode.bench.models import ProbeShape, of_shape
from safe_decode.monitor.monitor import RiskMonitor
from safe_decode.policy.policy import Policy
from safe_decode.probe.linear import LinearProbe
from safe_decode.session.trip_detector import TripDetector

WIDTH, SITES, FEATURES = 512, 5, 250
ROWS = pytest.mark.parametrize("rows", [1, 32])


def sites() -> tuple[Site, ...]:
    channels = tuple(range(0, FEATURES // SITES * 10, 10))
    return tuple(Site(layer, "mlp", channels) for layer in range(SITES))


def monitor_of(n_heads: int) -> RiskMonitor:
    bundle = of_shape("nano", probe=ProbeShape(features=16, heads=n_heads)).bundle
    return RiskMonitor(bundle.monitor, 1e9)


@ROWS
def test_hear_and_take(benchmark: BenchmarkFixture, rows: int) -> None:
    beats, channels = ForwardRecorder(sites()), torch.tensor(sites()[0].channels)
    hidden = [torch.randn(rows, 1, WIDTH) for _ in range(SITES)]

    def step() -> torch.Tensor:
        for index, activation in enumerate(hidden):
            beats.hear(index, activation, channels)
        return beats.take()

    taken = benchmark(step)
    assert taken.shape == (rows, 1, FEATURES)


@ROWS
def test_probe(benchmark: BenchmarkFixture, rows: int) -> None:
    probe = LinearProbe(sites(), torch.randn(FEATURES, 1), torch.zeros(1), ("harm",))
    logits = benchmark(probe, torch.randn(rows, FEATURES))
    assert logits.shape == (rows, 1)


@ROWS
@pytest.mark.parametrize("n_heads", [1, 4])
def test_watch_step(benchmark: BenchmarkFixture, rows: int, n_heads: int) -> None:
    monitor = monitor_of(n_heads)
    logits = torch.randn(rows, n_heads)

    def fresh() -> tuple[tuple[TripDetector], dict[str, object]]:
        return (TripDetector(monitor, Policy(), monitor.start(rows)),), {}

    def hundred(watch: TripDetector) -> torch.Tensor:
        for _ in range(100):
            watch.step(logits)
            trips = watch.trips()
        return trips

    trips = benchmark.pedantic(hundred, setup=fresh, rounds=20)  # type: ignore[no-untyped-call]
    assert not bool(trips.any())


@ROWS
def test_monitor_step(benchmark: BenchmarkFixture, rows: int) -> None:
    monitor = monitor_of(1)
    state = monitor.start(rows)
    new = benchmark(monitor.step, state, torch.randn(rows, 1))
    assert new.step.tolist() == [1] * rows
