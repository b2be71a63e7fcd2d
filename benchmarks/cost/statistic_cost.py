"""What a statistic costs a step: `python -m benchmarks.cost.statistic_cost`.

The detector alone, from the logits of one token to whether a row trips, on the host, warm, arms
interleaved round by round. Figures are medians over rounds with bootstrap intervals.

Knows statistics and clocks. Does not know models.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.card import card, write_results
from probes.fitting.statistics import StatisticChoice
from safe_decode.bench.statistics import interval_of
from safe_decode.monitor.monitor import MonitorConfig, RiskMonitor
from safe_decode.policy.policy import Policy
from safe_decode.session.trip_detector import TripDetector

LOG = logging.getLogger("benchmarks.cost")
TOKENS = 256
_TODAY = "ema-16"
_LIMIT = 1.5


def configurations() -> Mapping[str, MonitorConfig]:
    """Name the statistics that are compared."""
    choices = (
        StatisticChoice("ema", 16),
        StatisticChoice("shrunk", 16),
        StatisticChoice("bank", 16, memory=64),
        StatisticChoice("top", 16, best=2),
        StatisticChoice("cusum", drift=1.0),
    )
    found = {}
    for one in choices:
        levels = len(one.levels)
        found[str(one)] = one.monitor((0.0,), (0.0,) * levels, (1.0,) * levels, 1.0)
    boundary = {"boundary_at": (8, 64, 512), "boundary": (0.5, 0.2, 0.0)}
    return {**found, "shrunk-16 even": replace(found["shrunk-16"], **boundary)}  # type: ignore[arg-type]


def seconds(config: MonitorConfig, logits: torch.Tensor) -> float:
    """Step one response a row, and return the seconds a token."""
    batch = logits.shape[1]
    monitor = RiskMonitor(config, 1e9)
    detector = TripDetector(
        monitor,
        Policy(redirect="refuse", on_error="close", holdback_tokens=4),
        monitor.start(batch),
    )
    begun = time.perf_counter()
    for step in logits:
        detector.step(step)
        detector.trips()
    return (time.perf_counter() - begun) / len(logits)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write `results/statistic-cost.jsonl`, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for batch in (1, 8, 64):
        logits = torch.randn(TOKENS, batch, 1)
        taken: dict[str, list[float]] = {name: [] for name in configurations()}
        with torch.inference_mode():
            for _ in range(arguments.rounds):
                for name, config in configurations().items():
                    taken[name].append(seconds(config, logits))
        for name, times in taken.items():
            ratio = interval_of(np.asarray(times) / np.asarray(taken[_TODAY]))
            rows.append(
                {
                    "statistic": name,
                    "batch": batch,
                    "us a step": round(1e6 * float(np.median(times)), 1),
                    f"times {_TODAY}": round(ratio.point, 2),
                    "95 % interval": ratio.as_list(2),
                    "target": f"<= {_LIMIT:g} at batch 1",
                    "met": "–" if batch > 1 else "yes" if ratio.point <= _LIMIT else "no",
                }
            )
            LOG.info("%s", json.dumps(rows[-1]))
    write_results("statistic-cost", rows, card(threads=1, rounds=arguments.rounds, tokens=TOKENS))


if __name__ == "__main__":
    main()
