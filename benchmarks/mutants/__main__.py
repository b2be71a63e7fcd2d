"""Plants faults and counts those that tests notice: `python -m benchmarks.mutants [MODULE ...]`.

Knows the plan and what is written. One process at a time; a module of 250 lines takes some
minutes.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.mutants import forks
from benchmarks.mutants.operators import Mutant, mutants_of
from benchmarks.mutants.plan import PLAN, MutatedModule

__all__ = ["main"]

LOG = logging.getLogger("benchmarks.mutants")
ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the modules asked for, write results and page; 1 where they fall short."""
    asked = _asked(arguments)
    if asked.list:
        for subject in asked.subjects:
            for mutant in _mutants(subject, asked.only):
                LOG.info("%s:%d %s", subject.path, mutant.line, mutant.name)
        return 0
    rows: list[dict[str, Any]] = []
    if not asked.page:
        forks.get_ready()
        rows = [_measured(subject, asked.only) for subject in asked.subjects]
    return _written(rows, is_whole=not asked.only)


def _written(rows: Sequence[dict[str, Any]], *, is_whole: bool) -> int:
    # Imported behind the forks: these rooms import the project.
    from benchmarks.card import card, write_results
    from benchmarks.mutants import report
    from safe_decode.whole_files import write_whole

    if not is_whole:
        return 0  # a part of a module is looked at, not recorded
    new = {row["module"]: row for row in rows}
    old = {row["module"]: row for row in report.recorded()}
    order = [subject.module for subject in PLAN]
    merged = [found for name in order if (found := new.get(name, old.get(name))) is not None]
    if rows:
        write_results("mutants", merged, card())
    given = report.reasons()
    write_whole(report.PAGE, report.page(merged, given))
    missing = report.shortfalls(merged, given)
    for line in missing:
        LOG.warning("%s", line)
    return int(bool(missing))


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [subject.module for subject in PLAN]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(names))
    parser.add_argument("--only", default="", help="mutants whose name holds this text")
    parser.add_argument("--list", action="store_true", help="name the mutants, run nothing")
    parser.add_argument("--page", action="store_true", help="write the page, run nothing")
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.modules) - set(names))
    if unknown:
        parser.error(f"MODULE {unknown[0]!r} is not one of {', '.join(names)}")
    asked.subjects = [s for s in PLAN if s.module in (asked.modules or names)]
    return asked


def _mutants(subject: MutatedModule, only: str = "") -> list[Mutant]:
    source = (ROOT / subject.path).read_text("utf-8")
    return [mutant for mutant in mutants_of(source) if only in mutant.name]


def _measured(subject: MutatedModule, only: str) -> dict[str, Any]:
    tests = [f"tests/{name}" for name in subject.tests]
    bare = forks.run(tests, limit_s=900.0)
    if bare.outcome != "survived":
        raise SystemExit(f"{subject.module}: its tests fail without a fault.\n{bare.shown}")
    limit_s = 30.0 + 4.0 * bare.seconds
    LOG.info("%s: tests take %.1f s", subject.module, bare.seconds)
    counts, survivors, seconds = {"killed": 0, "survived": 0, "timeout": 0}, [], 0.0
    path = ROOT / subject.path
    for mutant in mutants_of(path.read_text("utf-8")):
        if only not in mutant.name:
            continue
        verdict = forks.run(
            tests,
            fault=forks.Fault(f"safe_decode.{subject.module}", path, mutant.tree),
            limit_s=limit_s,
        )
        counts[verdict.outcome] += 1
        seconds += verdict.seconds
        level = logging.INFO if verdict.outcome == "killed" else logging.WARNING
        LOG.log(level, "%s:%d %s %s", verdict.outcome, mutant.line, mutant.name, _why(verdict))
        if verdict.outcome == "survived":
            survivors.append(mutant.name)
    return {
        "module": subject.module,
        "mutants": sum(counts.values()),
        "killed": counts["killed"],
        "survived": counts["survived"],
        "timeouts": counts["timeout"],
        "seconds": round(seconds),
        "survivors": survivors,
    }


def _why(verdict: forks.MutantVerdict) -> str:
    """Name the test that failed."""
    failed = [line for line in verdict.shown.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return f"[{verdict.seconds:.1f} s] {failed[0][:100] if failed else ''}"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    raise SystemExit(main())
