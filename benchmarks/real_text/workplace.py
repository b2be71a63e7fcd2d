"""Arguments that the steps of the study share, and which worker has which shard.

Knows paths and processes. Does not know what a shard holds.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from safe_decode.whole_files import write_whole

__all__ = ["claim", "parser_of"]


def parser_of(about: str | None, *, has_model: bool = False) -> argparse.ArgumentParser:
    """Return a parser of the data and the work directory, and of the model before them."""
    parser = argparse.ArgumentParser(description=about)
    if has_model:
        parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    return parser


def claim(finished: Path) -> bool:
    """Take a shard for this process, unless it is finished or another process is at it.

    A shard whose process has ended without finishing it is free again.
    """
    if finished.exists():
        return False
    path = finished.with_suffix(".taken")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        if _is_running(path.read_text("utf-8")):
            return False
        write_whole(path, str(os.getpid()))
    return True


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    return True
