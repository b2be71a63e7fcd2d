"""`safe-decode capabilities`: what of `generate` is guarded, and what is refused and why."""

from __future__ import annotations

from dataclasses import asdict

from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json
from safe_decode.cli.options import JsonOptions

__all__ = ["capabilities"]


@command("Tools")
def capabilities(options: JsonOptions) -> None:
    """Print what of `generate` is supported, and what is refused and why."""
    from rich.table import Table

    from safe_decode.engines.transformers.capabilities import TABLE

    if options.as_json:
        rows = [{**asdict(row), "neutral": [repr(n) for n in row.neutral]} for row in TABLE]
        print_json({"capabilities": rows})
        return
    table = Table("feature", "status", "note", "instead")
    for row in TABLE:
        table.add_row(row.feature, row.status, row.reason, row.instead)
    console().print(table)
