"""Do the short ways of a step pay? `python -m benchmarks.cost.shortcuts`.

A step of the guard takes short ways where nothing happens. Each is switched off in turn, beside
the whole guard and the bare model in one run, on the embedded shape and on published ones. A short
way pays where switching it off makes a step longer by more than chance: then its interval lies
above 1. Results go to `results/shortcuts-left.jsonl`. The machine should have nothing else to do.

`results/shortcuts.jsonl` holds what was measured of those that have been removed since, at the
commit that its card names; see decision 126.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from benchmarks.card import card, write_results
from safe_decode.bench.arms import Arm, Load, arms_of, options_of
from safe_decode.bench.models import Subject, embedded_subject, of_shape
from safe_decode.bench.runner import interleaved
from safe_decode.bench.statistics import interval_of
from safe_decode.engines.transformers.loops.row_status import RowStatus
from safe_decode.monitor.config import MonitorConfig

LOG = logging.getLogger("benchmarks.cost.shortcuts")
_TRIPPING_SHARE = 0.25
LOADS = (
    ("embedded", Load(1, 128, 64), "guard", 120),
    ("embedded", Load(32, 128, 32), "guard", 60),
    ("embedded", Load(8, 128, 32), "tripping", 60),
    ("llama-160m", Load(1, 64, 16), "guard", 24),
)
"""Subject, load, the arm of `safe_decode.bench.arms` that short ways are taken out of, rounds."""


@contextmanager
def put(owner: object, name: str, value: object) -> Iterator[None]:
    """Put another attribute in the place of one."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


SHORTCUTS: Mapping[str, tuple[str, Callable[[], AbstractContextManager[None]]]] = {
    "levels alone decide": (
        "monitor/config.py: level_decides",
        lambda: put(MonitorConfig, "level_decides", property(lambda _: False)),
    ),
    "rows that go on are not sorted": (
        "loops/row_status.py: go_on_as_they_are",
        lambda: put(RowStatus, "go_on_as_they_are", lambda *_: False),
    ),
}


def rows_of(subject: Subject, load: Load, whole: str, rounds: int) -> list[dict[str, Any]]:
    """Measure every short way under one load; `whole` names the arm that has them all."""
    found = arms_of(subject, load, tripping_share=_TRIPPING_SHARE)
    arms = {name: found[name] for name in ("bare", whole)}
    arms |= {name: Arm(name, found[whole].run, off) for name, (_, off) in SHORTCUTS.items()}
    laps = interleaved(arms, options_of(subject, load), rounds=rounds, clock=load.clock)
    medians = {
        name: np.array([np.median(lap.steps) for lap in taken]) / 1e3
        for name, taken in laps.items()
    }
    rows = []
    for name, (where, _) in SHORTCUTS.items():
        ratio = interval_of(medians[name] / medians[whole])
        added = interval_of(medians[name] - medians[whole])
        rows.append(
            {
                "subject": subject.name,
                "batch": load.batch,
                "arm": whole,
                "short way": name,
                "where": where,
                "step without it / with it": round(ratio.point, 4),
                "95 % interval": ratio.as_list(4),
                "us a step": round(added.point, 1),
                "guard / bare": round(float(np.median(medians[whole] / medians["bare"])), 4),
                "rounds": rounds,
                "pays": "yes" if ratio.low > 1 else "not shown",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, write `results/shortcuts-left.jsonl`, print the rows."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost.shortcuts", description=__doc__
    )
    parser.add_argument("--scale", type=float, default=1.0, help="times the rounds")
    parser.add_argument("--loads", type=int, default=len(LOADS), help="the first so many")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows, facts = [], card(threads=torch.get_num_threads())
    for name, load, whole, rounds in LOADS[: given.loads]:
        subject = embedded_subject() if name == "embedded" else of_shape(name)
        found = rows_of(subject, load, whole, max(2, round(rounds * given.scale)))
        for row in found:
            LOG.info("%s", row)
        rows += found
        write_results("shortcuts-left", rows, facts)
    return rows


if __name__ == "__main__":
    main()
