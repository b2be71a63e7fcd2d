"""Small pieces of Markdown: tables, cells, intervals, pictures.

Knows how a figure is written. Does not know what it means.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probes.metrics.detection import Proportion

__all__ = ["cell", "image", "mean_sd", "percent", "table", "words"]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Draw a Markdown table; figures to four digits."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
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
    return str(value).replace("|", "\\|")
