"""Where our studies write, and the card with the commit they were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safe_decode.bench import machine

__all__ = ["RESULTS", "aligned", "card", "write_results"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def card(**facts: object) -> dict[str, object]:
    """Describe machine, versions and commit, and add the study's own facts."""
    return machine.card(commit=machine.commit_of(ROOT), **facts)


def write_results(name: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
    """Write `results/NAME.jsonl` whole: the rows, then the card."""
    target = RESULTS / f"{name}.jsonl"
    machine.write_lines(target, rows, facts)
    return target


def aligned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give every row the fields of all, in the order of their first appearance."""
    fields = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "") for name in fields} for row in rows]
