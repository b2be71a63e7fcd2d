"""The few results that the README shows, those that miss their target included.

Knows which row of which results is shown, and in which words. Does not know how anything was
measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.docs.markdown import table
from safe_decode.bench.machine import read_lines

__all__ = ["SHOWN", "Shown", "for_readme", "for_site"]

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True, slots=True)
class Shown:
    """One row of the summary.

    Attributes:
        what: In words.
        results: Name of the file of results.
        where: Values that pick one row of it.
        guarded: Column of the figure.
        beside: Column of what it is compared with, or None.
        page: Page of the site, below `results/`.
    """

    what: str
    results: str
    where: Mapping[str, Any]
    guarded: str
    page: str
    beside: str | None = None
    interval: str = field(default="95 % interval")


SHOWN = (
    Shown(
        "time a token, batch 1, as a ratio to the bare model",
        "cost",
        {"what": "time a token, batch 1"},
        "guarded / bare, median",
        "cost",
    ),
    Shown(
        "answers that turn harmful and trip, %",
        "detection",
        {"what": "answers that turn harmful: tripped, s_0 excluded"},
        "guarded %",
        "detection",
    ),
    Shown(
        "benign answers that trip, unseen kinds of requests, %",
        "detection",
        {"what": "benign responses tripped, unseen cells"},
        "guarded %",
        "detection",
    ),
    Shown(
        "harm released where somebody began the harmful act for the model, %",
        "detection",
        {"what": "harmful released, answer begun to turn"},
        "guarded %",
        "detection",
        beside="bare %",
    ),
    Shown(
        "benign answers that trip behind 500 tokens that somebody else wrote, %",
        "long-prefill",
        {"what": "content: benign twins tripped"},
        "%",
        "long-answers",
    ),
    Shown(
        "behaviours that an attacker gets with 100 plain queries, %",
        "attacks",
        {"bundle": "shipped", "threat": "T1", "arm": "guarded"},
        "success %",
        "attacks",
    ),
)
"""Six: what it costs, what it catches, what it disturbs, and where it fails."""

_COLUMNS = ("what", "guarded", "bare", "95 % interval", "target", "met")


def for_readme() -> str:
    """Draw the table with links as the README needs them."""
    return _drawn("docs/results")


def for_site() -> str:
    """Draw the table with links as the home page of the site needs them."""
    return _drawn("results")


def _drawn(folder: str) -> str:
    return table(_COLUMNS, [_cells(shown, folder) for shown in SHOWN])


def _cells(shown: Shown, folder: str) -> list[object]:
    rows, _ = read_lines(RESULTS / f"{shown.results}.jsonl")
    row = _only(rows, shown.where, shown.results)
    bare = None if shown.beside is None else row[shown.beside]
    if shown.results == "attacks":
        bare = _only(rows, {**shown.where, "arm": "bare"}, shown.results)[shown.guarded]
    return [
        f"[{shown.what}]({folder}/{shown.page}.md)",
        row[shown.guarded],
        bare,
        row[shown.interval],
        row.get("target"),
        row.get("met"),
    ]


def _only(rows: list[dict[str, Any]], where: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = [row for row in rows if all(row[key] == value for key, value in where.items())]
    if len(found) != 1:
        raise ValueError(f"{name}.jsonl has {len(found)} rows with {dict(where)}, wanted one.")
    return found[0]
