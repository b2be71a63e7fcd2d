"""Progress for people: shown on a terminal only, on standard error.

Knows whether anyone watches. Does not know what is being done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Advance", "progress"]


class Advance(Protocol):
    """Tells the display that some more units are done."""

    def __call__(self, done: int) -> None:
        """Count `done` more."""


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Show a bar while the block runs, and nothing where standard error is not a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
