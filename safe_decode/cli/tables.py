"""Tables that never break a word, whatever the width of the terminal.

A table that fits is a table. One whose words do not fit side by side is written downwards, a
block of names and values for each row; a single word longer than a line is left whole.

Knows widths and words. Does not know what a table is about.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safe_decode.cli.console import console
from safe_decode.trace.shown import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["WordTable", "fitted_widths", "print_table"]

_GAP = 2
"""Columns of the terminal between two columns of a table."""
_PROSE = 16
"""A column of longer texts is not made narrower than this: its rows would grow too tall."""
_INDENT = 2


@dataclass(frozen=True)
class WordTable:
    """What a table says.

    Attributes:
        columns: Names of the columns; all empty for a table of names and values without a header.
        rows: One text a column.
        title: Stands above, or empty.
        caption: Stands below, or empty.
        right: Columns of numbers, aligned to the right.
        apart: Rows before which a line is left empty.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    right: Collection[str] = ()
    apart: Collection[int] = ()

    def drawn(self, width: int) -> Iterator[RenderableType]:
        """Yield what is printed, one after the other, for a terminal of `width` columns."""
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="bold italic")
        rows = [[visible(cell) for cell in row] for row in self.rows]
        cells = [self.columns, *rows]
        natural = [max(_longest_line(row[at]) for row in cells) for at in range(len(self.columns))]
        least = [
            max(*(_longest_word(row[at]) for row in cells), _least_of_prose(rows, at))
            for at in range(len(self.columns))
        ]
        widths = fitted_widths(natural, least, width - _GAP * (len(self.columns) - 1))
        yield from self._blocks(rows, width) if widths is None else [self._grid(rows, widths)]
        if self.caption:
            yield Text(self.caption, style="dim")

    def _grid(self, rows: Sequence[Sequence[str]], widths: Sequence[int]) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        for name, width in zip(self.columns, widths, strict=True):
            grid.add_column(width=width, justify="right" if name in self.right else "left")
        if any(self.columns):
            grid.add_row(*(Text(name, style="bold") for name in self.columns))
        for number, row in enumerate(rows):
            if number in self.apart:
                grid.add_row()
            grid.add_row(*map(Text, row))
        return grid

    def _blocks(self, rows: Sequence[Sequence[str]], width: int) -> Iterator[RenderableType]:
        """Write each row as a block of its own: what it is about, then names and values."""
        from rich.text import Text

        if not any(self.columns):
            yield from self._facts(rows, width)
            return
        names = max((len(name) for name in self.columns[1:]), default=0)
        for number, row in enumerate(rows):
            if number:
                yield Text()
            yield from _lines(f"{self.columns[0]}: {row[0]}", width, "", style="bold")
            for name, cell in zip(self.columns[1:], row[1:], strict=True):
                if cell:
                    yield from _named(" " * _INDENT + f"{name:<{names}}", cell, width)

    def _facts(self, rows: Sequence[Sequence[str]], width: int) -> Iterator[RenderableType]:
        """Write names and values, a value too long for the place beside its name below it."""
        names = max(_longest_line(row[0]) for row in rows)
        for row in rows:
            if len(row) == 1 or names > width // 2:
                yield from _lines(row[0], width, "")
                for cell in row[1:]:
                    yield from _lines(cell, width, " " * _INDENT)
            else:
                yield from _named(f"{row[0]:<{names}}", " ".join(row[1:]), width)


def print_table(table: WordTable, screen: Console | None = None) -> None:
    """Print a table; without `screen`, on standard output."""
    from rich.text import Text

    screen = console() if screen is None else screen
    for part in table.drawn(screen.width):
        # What is not to be wrapped has been wrapped already, but for words longer than a line.
        screen.print(part, crop=False, soft_wrap=isinstance(part, Text) and bool(part.no_wrap))


def fitted_widths(natural: Sequence[int], least: Sequence[int], room: int) -> list[int] | None:
    """Divide the width of a table among its columns.

    Args:
        natural: Width that each column would like.
        least: Width without which a word of it would break.
        room: Width for all of them.

    Returns:
        A width for each column, or None where the words do not fit.
    """
    if sum(natural) <= room:
        return list(natural)
    spare = room - sum(least)
    if spare < 0:
        return None
    lacking = [wish - need for wish, need in zip(natural, least, strict=True)]
    return [need + spare * lack // sum(lacking) for need, lack in zip(least, lacking, strict=True)]


def _least_of_prose(rows: Sequence[Sequence[str]], at: int) -> int:
    is_prose = any(_longest_line(row[at]) > _PROSE for row in rows)
    return _PROSE if is_prose else 0


def _named(name: str, value: str, width: int) -> Iterator[RenderableType]:
    lead = name + " " * _GAP
    if _longest_word(value) > width - len(lead):
        yield from _lines(name.rstrip(), width, "")
        lead = " " * 2 * _INDENT
    yield from _lines(value, width, lead)


def _lines(text: str, width: int, lead: str, style: str = "") -> Iterator[RenderableType]:
    from rich.text import Text

    found = [
        line
        for part in text.splitlines() or [""]
        for line in textwrap.wrap(
            part, max(1, width - len(lead)), break_long_words=False, break_on_hyphens=False
        )
        or [""]
    ]
    for number, line in enumerate(found):
        before = lead if number == 0 else " " * len(lead)
        yield Text(before + line, style=style, no_wrap=True, overflow="ignore")


def _longest_line(text: str) -> int:
    from rich.cells import cell_len

    return max((cell_len(line) for line in text.splitlines()), default=0)


def _longest_word(text: str) -> int:
    from rich.cells import cell_len

    return max((cell_len(word) for word in text.split()), default=0)
