"""On which machine, with which versions and from which commit each table was measured.

Knows the cards of results. Does not know the results themselves.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.docs.markdown import table
from safe_decode.bench.machine import read_lines

__all__ = ["as_markdown"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
_FACTS = ("machine", "python", "torch", "transformers", "load", "commit")


def as_markdown() -> str:
    """Draw one row a file of results that has a card, by name."""
    rows = []
    for path in sorted(RESULTS.glob("*.jsonl")):
        _, card = read_lines(path)
        if card:
            rows.append([f"`{path.stem}`", *(card.get(name) for name in _FACTS)])
    return table(("results", *_FACTS), rows)
