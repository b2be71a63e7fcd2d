"""The reference of the command line, as typer writes it from the commands themselves.

Knows where typer's text begins to be of use. Does not know what any command does.
"""

from __future__ import annotations

import typer
from typer.cli import get_docs_for_click

from safe_decode.cli.main import app

__all__ = ["as_markdown"]


def as_markdown() -> str:
    """Describe every command: its help, how it is called, its arguments and options."""
    group = typer.main.get_command(app)
    name = "safe-decode"
    written = get_docs_for_click(obj=group, ctx=typer.Context(group), name=name)
    # Before the first command stands a list of all of them, with their help cut off.
    return written[written.index(f"## `{name} ") :].strip()
