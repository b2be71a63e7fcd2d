"""Facts as a table of names and values, and warnings about what was read.

Knows streams and how values are written. Does not know what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safe_decode.cli.console import console
from safe_decode.cli.tables import WordTable, print_table

if TYPE_CHECKING:
    from probes.data.reader import Reading

__all__ = ["show_facts", "show_warnings"]


def show_facts(title: str, facts: Mapping[str, object], wrote: Path | None = None) -> None:
    """Print a table of names and values."""
    rows = [(name.replace("_", " "), _shown(value)) for name, value in facts.items()]
    print_table(WordTable(("", ""), rows, title))
    if wrote is not None:
        console().print(f"wrote {wrote}", soft_wrap=True)


def show_warnings(readings: Sequence[Reading], warnings: Sequence[str] = ()) -> None:
    """Tell on standard error what was left out and what is short."""
    screen = console(stderr=True)
    for reading in readings:
        if reading.bad:
            screen.print(
                f"{reading.source}: {reading.bad} of {reading.rows} rows cannot be used",
                soft_wrap=True,
            )
        for line in reading.named:
            screen.print(f"  {line}", soft_wrap=True)
        if reading.note is not None:
            screen.print(f"{reading.source}: {reading.note}", soft_wrap=True)
    for line in warnings:
        screen.print(f"warning: {line}", soft_wrap=True)


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value) or "–"
    return str(value)
