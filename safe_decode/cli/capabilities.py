"""`safe-decode capabilities`: what of `generate` is guarded, and what is refused and why."""

from __future__ import annotations

from dataclasses import asdict

from safe_decode.cli.command import command
from safe_decode.cli.console import print_json
from safe_decode.cli.options import JsonOptions
from safe_decode.cli.tables import WordTable, print_table

__all__ = ["capabilities"]


@command("Tools")
def capabilities(options: JsonOptions) -> None:
    """Print what of `generate` is supported, and what is refused and why."""
    from safe_decode.engines.transformers.capabilities import TABLE

    if options.as_json:
        rows = [{**asdict(row), "neutral": [repr(n) for n in row.neutral]} for row in TABLE]
        print_json({"capabilities": rows})
        return
    cells = [(row.feature, row.status, row.reason, row.instead) for row in TABLE]
    print_table(WordTable(("feature", "status", "note", "instead"), cells))
