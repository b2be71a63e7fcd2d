"""`docs/development/mutants.md`: what was planted, what was noticed, and why the rest was not.

Knows results and reasons. Does not know how a mutant runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.card import RESULTS, ROOT
from benchmarks.docs.markdown import table
from safe_decode.bench.machine import read_lines

__all__ = ["PAGE", "TARGET", "page", "reasons", "recorded", "shortfalls"]

PAGE = ROOT / "docs" / "development" / "mutants.md"
TARGET = 0.9
"""Share of the mutants of each module that the tests are to notice."""

_REASONS = Path(__file__).with_name("reasons.yaml")
_ABOUT = """# Mutants

A mutant is a module with one small fault: a comparison turned, a sign lost, a call left out. A
mutant is killed when a test fails, or when the tests do not end in time. One that survives is a
line that no test states, or a change that changes nothing. `make mutants` plants them and runs,
for each, the tests that `benchmarks/mutants/plan.py` names; `make mutants ARGS=monitor` runs one
module. This page is written by `python -m benchmarks.mutants --page`.
"""


def reasons() -> dict[str, dict[str, str]]:
    """Read why survivors survive: module -> mutant -> reason."""
    found: dict[str, dict[str, str]] = yaml.safe_load(_REASONS.read_text("utf-8")) or {}
    return found


def recorded() -> list[dict[str, Any]]:
    """Read the rows of the results, one a module; empty before the first run."""
    source = RESULTS / "mutants.jsonl"
    if not source.exists():
        return []
    rows, _ = read_lines(source)
    return rows


def shortfalls(
    rows: Sequence[Mapping[str, Any]], given: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """Say which modules miss the target and which survivors have no reason."""
    found = []
    for row in rows:
        if _share(row) < TARGET:
            found.append(f"{row['module']}: {_share(row):.1%} killed, wanted {TARGET:.0%}")
        known = given.get(row["module"], {})
        found += [f"{row['module']}: no reason for {n}" for n in row["survivors"] if n not in known]
    return found


def page(rows: Sequence[Mapping[str, Any]], given: Mapping[str, Mapping[str, str]]) -> str:
    """Write the page."""
    columns = ("module", "mutants", "killed", "timeouts", "survived", "noticed")
    cells = [
        (
            f"`{row['module']}`",
            row["mutants"],
            row["killed"],
            row["timeouts"],
            row["survived"],
            f"{_share(row):.1%}",
        )  # noqa: E501
        for row in rows
    ]
    parts = [_ABOUT, table(columns, cells)]
    for row in rows:
        if row["survivors"]:
            known = given.get(row["module"], {})
            lines = [
                f"- `{n.replace('`', '')}`: {known.get(n, 'no reason is given yet.')}"
                for n in row["survivors"]
            ]  # noqa: E501
            parts.append("\n".join([f"\n## `{row['module']}`: survivors\n", *lines]))
    return "\n".join(parts) + "\n"


def _share(row: Mapping[str, Any]) -> float:
    return float((row["killed"] + row["timeouts"]) / row["mutants"]) if row["mutants"] else 1.0
