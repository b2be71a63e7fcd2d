"""What serving costs and whether it holds: `python -m benchmarks.serving QUESTION`.

Each question starts servers, each in a process of its own, and asks them over HTTP. Correctness
comes first: what is wrong, lost, mixed up or unguarded is decided by `oracle`, against
`SafeDecoder` in this process. The last line is JSON. At full scale the answer goes into
benchmarks/results/serving.jsonl, beside those of other questions; a smaller `--scale` is a look,
not a result. A missed target ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.card import RESULTS, card, write_results
from benchmarks.serving import fuzz, load, loop_hold, rates, shutdown, slow
from benchmarks.serving.client import MODEL

LOG = logging.getLogger("benchmarks.serving")


class Question(NamedTuple):
    """One row of the table.

    Attributes:
        ask: Measures, at a scale in (0, 1].
        minutes: What it takes at full scale on two cores, roughly.
    """

    ask: Callable[[float], dict[str, Any]]
    minutes: float


QUESTIONS: Mapping[str, Question] = {
    "crowd": Question(load.crowd, 7),
    "overload": Question(load.overload, 2.5),
    "slow": Question(slow.slow, 2.5),
    "offline": Question(rates.offline, 3),
    "throughput": Question(rates.throughput, 10),
    "proxy": Question(rates.proxy, 1.5),
    "loop_hold": Question(loop_hold.loop_hold, 8),
    "sigterm": Question(shutdown.terminated, 2),
    "kill": Question(shutdown.killed, 6),
    "failure": Question(shutdown.failure, 4),
    "schemathesis": Question(fuzz.fuzz, 5),
    "hostile": Question(fuzz.hostile, 4),
}


def main() -> None:
    """Ask one question, or all of them."""
    given = _parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    LOG.setLevel(logging.INFO)
    names = list(QUESTIONS) if given.question == "all" else [given.question]
    missed = False
    for name in names:
        row = {"study": name, **QUESTIONS[name].ask(given.scale)}
        missed |= bool(row["missed"])
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        if given.scale >= 1:
            LOG.info("written: %s", _keep(row))
    sys.exit(1 if missed else 0)


def _parser() -> argparse.ArgumentParser:
    lines = [
        f"  {name:13} {question.minutes:>4g} min  {(question.ask.__doc__ or '').strip()}"
        for name, question in QUESTIONS.items()
    ]
    total = sum(question.minutes for question in QUESTIONS.values())
    lines.append(f"  {'all':13} {total:>4g} min  one after another")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        epilog="questions, with estimates for two idle cores at full scale:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("question", nargs="?", default="all", choices=["all", *QUESTIONS])
    parser.add_argument(
        "--scale",
        type=_scale,
        default=1.0,
        help="share of clients, seconds and answers, in (0, 1]; 0.02 takes seconds each",
    )
    return parser


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"--scale={text} is outside (0, 1]; pass 1 for a result.")
    return value


def _keep(row: Mapping[str, Any]) -> str:
    """Put a study's measures in the place of its older ones; other studies stay."""
    target = RESULTS / "serving.jsonl"
    lines = target.read_text(encoding="utf-8").splitlines() if target.exists() else []
    kept = [old for old in map(json.loads, lines) if "card" not in old]
    fresh = [
        {"study": row["study"], "measure": name.replace("_", " "), "value": value}
        for name, value in row.items()
        if name != "study"
    ]
    by_study = {name: [old for old in kept if old["study"] == name] for name in QUESTIONS}
    by_study[str(row["study"])] = fresh
    rows = [one for name in QUESTIONS for one in by_study[name]]
    return str(write_results("serving", rows, card(model=MODEL)))


if __name__ == "__main__":
    main()
