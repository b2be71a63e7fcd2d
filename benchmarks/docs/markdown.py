"""Small pieces of Markdown: tables, cells, intervals, pictures.

Knows how a figure is written, and how wide a table may be. Does not know what figures mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from probes.metrics.detection import Proportion

__all__ = ["MOST_COLUMNS", "cell", "image", "mean_sd", "percent", "table", "words"]

MOST_COLUMNS = 9
"""What a screen shows beside each other."""


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Draw a Markdown table, figures to four digits.

    A table of more than `MOST_COLUMNS` columns becomes several, one below the other. Each repeats
    the first columns that together tell the rows apart.

    Args:
        columns: Their names.
        rows: A value a column.
    """
    if len(columns) <= MOST_COLUMNS:
        return _drawn(columns, rows, range(len(columns)))
    keys = next(
        (n for n in range(1, MOST_COLUMNS - 1) if len({str(row[:n]) for row in rows}) == len(rows)),
        1,
    )
    others = range(keys, len(columns))
    n_parts = -(-len(others) // (MOST_COLUMNS - keys))
    width = -(-len(others) // n_parts)
    parts = (others[start : start + width] for start in range(0, len(others), width))
    return "\n\n".join(_drawn(columns, rows, (*range(keys), *part)) for part in parts)


def _drawn(columns: Sequence[str], rows: Sequence[Sequence[object]], shown: Sequence[int]) -> str:
    lines = [f"| {' | '.join(columns[i] for i in shown)} |", f"|{'---|' * len(shown)}"]
    lines += [f"| {' | '.join(cell(row[i]) for i in shown)} |" for row in rows]
    return "\n".join(lines)


def mean_sd(values: Sequence[float]) -> str:
    """Write a mean, and the standard deviation of several values."""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def percent(share: Proportion) -> str:
    """Write a share with its 95 % interval, in per cent."""
    return f"{100 * share.point:.0f} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def words(name: str) -> str:
    """Turn a key into words."""
    return name.replace("_", " ")


def image(title: str, picture: Path) -> str:
    """Show a picture that lies in a folder beside the page."""
    return f"![{title}]({picture.parent.name}/{picture.name})"


def cell(value: object) -> str:
    """Write one value; floats to four digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(cell(part) for part in value)}]"
    if isinstance(value, Mapping):
        return ", ".join(f"{words(str(name))} {cell(part)}" for name, part in value.items())
    return str(value).replace("|", "\\|")
