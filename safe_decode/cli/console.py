"""How commands speak: JSON for programs, tables for people, progress for who waits.

Knows streams and consoles. Does not know what is said. Results go to standard output,
everything else to standard error, so that output can be piped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safe_decode.errors import ConfigurationError
from safe_decode.plain_progress import EVERY_S, PlainProgress, beating
from safe_decode.whole_files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Tick",
    "console",
    "print_error",
    "print_json",
    "progress",
    "require_folder",
    "require_place",
    "working",
    "write_text",
]

Tick = Callable[[int], None]
"""Report that so many more units of the work are done."""


def console(*, stderr: bool = False) -> Console:
    """Return a console that shows text as it is: no markup, no emoji, no guessing."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_json(value: Mapping[str, object]) -> None:
    """Write one JSON document to standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def print_error(error: Exception) -> None:
    """Write an error as one line to standard error."""
    from safe_decode.trace.shown import visible

    line = " ".join(visible(str(error)).split())
    console(stderr=True).print(f"error: {line}", style="bold red", soft_wrap=True)


@contextlib.contextmanager
def progress(
    label: str, total: int, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Tick]:
    """Show how far a piece of work has come: a bar, or a line now and then without a terminal.

    Args:
        label: What is being done.
        total: Units of work; each call of the yielded function reports some of them.
        clock: Seconds that only grow, for the lines.
    """
    target = console(stderr=True)
    if not target.is_terminal:
        told = PlainProgress(label, partial(target.print, soft_wrap=True), total=total, clock=clock)
        yield told.advance
        told.finish()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, Elapsed(), console=target, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)


@contextlib.contextmanager
def working(
    label: str, *, clock: Callable[[], float] = time.monotonic, every_s: float = EVERY_S
) -> Iterator[None]:
    """Show that something of unknown length is under way; without a terminal, by plain lines.

    Args:
        label: What is being done.
        clock: Seconds that only grow, for the lines.
        every_s: Seconds between two looks at the clock.
    """
    target = console(stderr=True)
    if target.is_terminal:
        with target.status(label):
            yield
        return
    told = PlainProgress(label, partial(target.print, soft_wrap=True), clock=clock)
    with beating(told, every_s=every_s):
        yield


def require_place(path: Path | None) -> None:
    """Check, before any work, that a file could be written there; None is no file.

    Raises:
        ConfigurationError: Its directory is not there or may not be written to, or it is one
            itself.
    """
    if path is not None and (not path.parent.is_dir() or path.is_dir()):
        raise ConfigurationError(
            f"{path} cannot be written; pass a file in a directory that exists."
        )
    if path is not None and not os.access(path.parent, os.W_OK):
        raise ConfigurationError(
            f"{path} cannot be written: {path.parent} may not be written to; pass another place."
        )


def require_folder(path: Path) -> None:
    """Check, before any work, that a directory could be made there, or is there already.

    Raises:
        ConfigurationError: A file stands in its way, or nothing may be written there.
    """
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ConfigurationError(f"{path} cannot be written: {there} is a file; pass a directory.")
    if not os.access(there, os.W_OK):
        raise ConfigurationError(
            f"{path} cannot be written: {there} may not be written to; pass another place."
        )


def write_text(path: Path, text: str) -> None:
    """Write a file that the user asked for, whole or not at all.

    Raises:
        ConfigurationError: It cannot be written there.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error.strerror}; pass a file in a directory that exists."
        ) from error
