"""`safe-decode reproduce TABLE`: make a published table again, from the protocol alone.

Knows the protocol's tables and how their steps are run. Does not know what a table means.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json
from safe_decode.cli.options import JsonOptions
from safe_decode.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from probes.runs.protocol import Protocol, TableProtocol

__all__ = ["reproduce"]

_PROTOCOL = Path("benchmarks") / "protocol.yaml"
_STANDARD_ERROR = 2  # the descriptor


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(JsonOptions):
    """Options of `safe-decode reproduce`."""

    table: Annotated[
        str | None,
        typer.Argument(
            help="Name of the table. Without it: all tables are listed.", metavar="[TABLE]"
        ),
    ] = None
    protocol: Annotated[
        Path | None,
        typer.Option(help="File of the protocol. Without it: the protocol of the repository."),
    ] = None
    dry_run: Annotated[
        bool, typer.Option(help="Print the steps of the table without running them.")
    ] = False


@command("Evaluate")
def reproduce(options: ReproduceOptions) -> None:
    """Regenerate a published table as the protocol fixes it."""
    from probes.runs.protocol import read_protocol

    path, table, as_json = _found(options.protocol), options.table, options.as_json
    fixed = read_protocol(path)
    if table is None:
        _list(fixed, as_json)
        return
    if table not in fixed.tables:
        raise ConfigurationError(
            f"TABLE={table!r} is not in {path.name}; pass one of {sorted(fixed.tables)}."
        )
    chosen = fixed.tables[table]
    if options.dry_run:
        if as_json:
            print_json({"table": table, "steps": [list(step) for step in chosen.steps]})
        else:
            console().print("\n".join(map(shlex.join, chosen.steps)), soft_wrap=True)
        return
    _run(chosen, path.resolve().parent.parent)
    if as_json:
        print_json({"table": table, "written": list(chosen.writes)})
    else:
        console().print(f"written: {', '.join(chosen.writes)}", soft_wrap=True)


def _found(protocol: Path | None) -> Path:
    if protocol is None:
        protocol = Path(__file__).resolve().parents[2] / _PROTOCOL
    if not protocol.is_file():
        raise ConfigurationError(
            f"protocol={protocol} is not there; tables are made in a checkout of the repository: "
            "run this there, or pass --protocol."
        )
    return protocol


def _run(table: TableProtocol, root: Path) -> None:
    for name in ("results", "journals"):
        (root / "benchmarks" / name).mkdir(parents=True, exist_ok=True)
    for step in table.steps:
        command = [sys.executable, "-m", *step]
        console(stderr=True).print(shlex.join(step), style="dim", soft_wrap=True)
        # What a step prints is no result of this command: it goes where progress goes.
        done = subprocess.run(command, cwd=root, check=False, stdout=_STANDARD_ERROR)
        if done.returncode:
            raise DataError(
                f"the step {shlex.join(step)} ended with status {done.returncode}; mend what it "
                "says and run the table again, it goes on where it stopped."
            )


def _list(fixed: Protocol, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                name: {"about": one.about, "minutes": one.minutes, "primary": one.primary}
                for name, one in fixed.tables.items()
            }
        )
        return
    from probes.cli.tables.figures import print_tables

    rows = [
        {
            "table": name,
            "about": one.about,
            "primary endpoint": one.primary,
            "minutes": f"about {one.minutes}",
        }
        for name, one in fixed.tables.items()
    ]
    print_tables({"Tables of the protocol": rows})
