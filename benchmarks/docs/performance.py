"""Fills the generated blocks of docs/performance.md: `python -m benchmarks.docs.performance`.

Knows which columns of which results are shown. Does not know how they were measured.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.docs.readme import ROOT, UNMEASURED, fill, table_of
from safe_decode.bench.machine import read_lines
from safe_decode.whole_files import write_whole

__all__ = ["main"]

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"

_COLUMNS: dict[str, tuple[str, ...]] = {
    "latency": (
        "run", "subject", "threads", "batch", "context", "arm", "n_rounds", "tpot_us",
        "tpot_p95_us", "added_us", "added_us_95", "ratio", "ratio_95", "tokens_per_s", "ttft_ms",
        "rest_ms", "added_kib",
    ),
    "growth": ("axis", "value", "bare_us", "added_us", "slope_us_per_unit", "slope_us_95"),
}  # fmt: skip


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Fill the page in place; what has not been measured says so."""

    def content(name: str, _above: str) -> str:
        source = results / f"{name}.jsonl"
        if not source.exists():
            return UNMEASURED
        rows, facts = read_lines(source)
        columns = _COLUMNS.get(name)
        if columns is not None:
            rows = [{column: row.get(column) for column in columns} for row in rows]
        return table_of([*map(json.dumps, rows), json.dumps({"card": facts})])

    write_whole(page, fill(page.read_text(encoding="utf-8"), content))


if __name__ == "__main__":
    main()
