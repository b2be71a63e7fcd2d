"""What the guard costs on an accelerator: `python -m benchmarks.cost.gpu` (`--tiny` on the CPU).

A shape with seeded weights (default llama-3-8b in bfloat16: 16 GB), made once; eager, compiled and
CUDA graphs at batch 1, 32 and 128. In each configuration three arms take turns in short calls:
bare, the guard, and bare once more as control, which says how far two equal arms differ here. The
device's clock is read between tokens, and rounds go on until the interval of guard over bare is
within 1 % on either side or the time is up: `ended` says which. Before that, scores and ids of the
arms are compared, and rows whose two largest scores tie are counted: a tie may be broken otherwise
by another kernel, and is no fault of the guard.

Every call is kept in `calls.jsonl` of `--out` as it ends. The same command goes on where it was
cut off, and leaves out what is finished. `--minutes` bounds all of it; what no time was left for
is named. Writes `results/gpu.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import RESULTS, card, write_results
from benchmarks.cost.blocks import Calls, Settled, compared, run_rounds
from safe_decode.bench.arms import Arm, Load, arms_of, options_of
from safe_decode.bench.compile_modes import MODES, Mode, modes_of
from safe_decode.bench.models import ProbeShape, Subject, of_shape
from safe_decode.bench.runner import beside
from safe_decode.bench.statistics import figures_of

LOG = logging.getLogger("benchmarks.cost.gpu")
ARMS = ("guard", "control")
"""Beside "bare". control: bare again."""
_MAX_CORES = 4


@dataclass(frozen=True)
class Study:
    """What is measured of each configuration.

    Attributes:
        shape: A key of `safe_decode.bench.models.SHAPES`.
        dtype: In what it computes.
        context: Prompt tokens of each row.
        new_tokens: Tokens of a call: a block.
        features: Channels that the probe reads.
        sites: Layers that they lie in; None: all.
        backend: Of torch.compile.
        rounds: At most so many.
    """

    shape: str = "llama-3-8b"
    dtype: str = "bfloat16"
    context: int = 128
    new_tokens: int = 16
    features: int = 4_096
    sites: int | None = None
    backend: str = "inductor"
    rounds: int = 400


TINY = Study("nano", "float32", 8, 4, 16, None, "aot_eager", rounds=6)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and write; returns the rows."""
    began = time.monotonic()
    parser = _parser()
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not given.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; pass --tiny to try the script out on the CPU")
    device = "cpu" if given.tiny else "cuda"
    study = TINY if given.tiny else _study(given)
    batches = [1, 2] if given.tiny else given.batch
    modes = modes_of("eager,compiled" if given.tiny else given.mode, device)
    _pin()
    calls = Calls(Path(given.out) / "calls.jsonl", json.dumps(asdict(study)))
    deadline = began + 60 * given.minutes
    subject = of_shape(
        study.shape,
        probe=ProbeShape(features=study.features, sites=study.sites),
        device=device,
        dtype=study.dtype,
        is_decided=True,
    )
    LOG.info("model made in %.0f s", time.monotonic() - began)
    wanted = [(mode, batch) for mode in modes for batch in batches]
    rows: list[dict[str, Any]] = []
    for number, (mode, batch) in enumerate(wanted):
        left = deadline - time.monotonic()
        if left <= 0:
            LOG.info("no time left for %s", ", ".join(f"{m} {b}" for m, b in wanted[number:]))
            break
        # What earlier configurations did not need is there for the later ones.
        until = time.monotonic() + left / (len(wanted) - number)
        rows += _measured(subject, study, mode, batch, calls, until)
        if not given.tiny:
            write_results("gpu", rows, card(**asdict(study)))
    LOG.info("%.0f s in all", time.monotonic() - began)
    return rows


def _measured(
    subject: Subject, study: Study, mode: Mode, batch: int, calls: Calls, until: float
) -> list[dict[str, Any]]:
    """Measure one configuration, unless that is done: a row an arm."""
    name = f"{mode} {batch}"
    if finished := calls.rows(name):
        LOG.info("%s was measured before", name)
        return finished
    load = Load(batch, study.context, study.new_tokens, mode=mode, backend=study.backend)
    options = options_of(subject, load)
    arms = _arms(subject, load)
    kept = calls.of(name)
    began = time.monotonic()
    same = compared(arms, options)
    for arm in arms.values():
        arm.lap(options)  # compiles, and is not kept
    warm_s = round(time.monotonic() - began, 1)
    settled = run_rounds(
        arms, options, kept, calls, name, settled=Settled(), rounds=study.rounds, until=until
    )
    noted = beside(arms, options, load, subject.model.device)
    facts = {
        **subject.facts(),
        "mode": mode,
        "batch": batch,
        "context": study.context,
        "new_tokens": study.new_tokens,
        "warm_s": warm_s,
        "ended": settled,
    }
    rows = []
    for figures in figures_of(kept, batch=batch):
        name_of_arm = str(figures["arm"])
        rows.append({**facts, **figures, **noted[name_of_arm], **same.get(name_of_arm, {})})
        LOG.info("%s", json.dumps(rows[-1]))
    if settled != "time":
        calls.finish(name, rows)
    return rows


def _arms(subject: Subject, load: Load) -> dict[str, Arm]:
    """Bare, the guard, and bare again."""
    found = arms_of(subject, load, tripping_share=0.0)
    bare = found["bare"]
    return {"bare": bare, "guard": found["guard"], "control": replace(bare, name="control")}


def _pin() -> None:
    """Keep to a few cores: moving between them shows in the clock."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_MAX_CORES])


def _study(given: argparse.Namespace) -> Study:
    return Study(**{name: getattr(given, name) for name in asdict(Study())})


def _parser() -> argparse.ArgumentParser:
    default = asdict(Study())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, value in default.items():
        kind = int if name == "sites" or isinstance(value, int) else str
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    parser.add_argument("--mode", default=",".join(MODES), help="by comma")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--out", default=str(RESULTS / "gpu"), help="keeps every call")
    parser.add_argument("--tiny", action="store_true", help="nano on the CPU; writes calls alone")
    return parser


def told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in a line each what a reader wants to know."""
    return [
        f"{row['mode']} {row['batch']}: {row['device_ratio'] or row['ratio']} of bare "
        f"{row['device_ratio_95'] or row['ratio_95']}, {row['ended']}"
        for row in rows
        if row["arm"] == "guard"
    ]


if __name__ == "__main__":
    for line in told(main()):
        LOG.info("%s", line)
