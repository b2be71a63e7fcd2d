"""Progress for people on standard error: a bar on a terminal, elsewhere a plain line now and then.

Knows whether anyone watches. Does not know what is being done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from safe_decode.plain_progress import PlainProgress

__all__ = ["Advance", "progress"]


class Advance(Protocol):
    """Tells the display that some more units are done."""

    def __call__(self, done: int) -> None:
        """Count `done` more."""


@contextmanager
def progress(
    description: str, total: int, *, clock: Callable[[], float] = monotonic
) -> Iterator[Advance]:
    """Show a bar while the block runs; where standard error is no terminal, lines.

    A line is written every half minute, and one at the end of what took longer than that.

    Args:
        description: What is being done.
        total: Units of work.
        clock: Seconds that only grow, for the lines.
    """
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        told = PlainProgress(
            description, partial(console.print, soft_wrap=True), total=total, clock=clock
        )
        yield told.advance
        told.finish()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
