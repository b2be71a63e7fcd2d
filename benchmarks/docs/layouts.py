"""How results become tables: which columns, in which order, and what stands in tables of its own.

Knows the names of results and columns. Does not know files, markers or what a figure means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.docs.markdown import cell, table

__all__ = ["LAYOUTS", "Layout", "card_lines", "laid_out"]

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of one file of results are shown.

    Attributes:
        columns: Those that are shown, in order; empty for all.
        groups: Columns whose values become a line above a table of their own.
        merged: Columns that become one, as "name value" pairs.
        merged_as: What that one is called; it comes first.
    """

    columns: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    merged_as: str = ""


LAYOUTS: Mapping[str, Layout] = {
    "attacks": Layout(groups=("bundle",)),
    "attacks-refit": Layout(groups=("bundle",)),
    "evaluation": Layout(groups=("responses", "first tokens")),
    "families": Layout(groups=("verdict",)),
    "growth": Layout(
        columns=("axis", "value", "bare_us", "added_us", "slope_us_per_unit", "slope_us_95")
    ),
    "latency": Layout(
        columns=(
            *("arm", "n_rounds", "tpot_us", "tpot_p95_us", "ratio", "ratio_95", "tokens_per_s"),
            *("added_us", "added_us_95", "ttft_ms", "rest_ms", "added_kib"),
        ),
        groups=("run",),
        merged=("subject", "threads", "batch", "context"),
        merged_as="call",
    ),
}


def laid_out(rows: Sequence[Row], layout: Layout = Layout()) -> str:  # noqa: B008 - frozen
    """Draw rows as one table, or as one a group.

    Args:
        rows: With the same keys each.
        layout: How.
    """
    shown = layout.columns or tuple(
        name for name in rows[0] if name not in (*layout.groups, *layout.merged)
    )
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_pairs(row, layout.groups), []).append(row)
    parts = []
    for title, members in groups.items():
        if title:
            parts.append(f"**{title}**")
        first = (layout.merged_as,) if layout.merged else ()
        cells = [
            ([_pairs(row, layout.merged)] if layout.merged else [])
            + [row.get(name) for name in shown]
            for row in members
        ]
        parts.append(table((*first, *shown), cells))
    return "\n\n".join(parts)


def card_lines(card: Row) -> str:
    """Say on what something was measured: one line, and a list of what are sentences."""
    facts = {name: value for name, value in card.items() if not _is_text_list(value)}
    told = {name: value for name, value in card.items() if _is_text_list(value)}
    parts = []
    if facts:
        parts.append(f"*{'; '.join(f'{name}: {cell(value)}' for name, value in facts.items())}.*")
    sentences = [f"- {name}: {one}" for name, several in told.items() for one in several]
    if sentences:
        parts.append("\n".join(sentences))
    return "\n\n".join(parts)


def _is_text_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _pairs(row: Row, names: Sequence[str]) -> str:
    return ", ".join(
        row[name] if isinstance(row[name], str) else f"{name} {cell(row[name])}"
        for name in names
        if row[name] is not None
    )
