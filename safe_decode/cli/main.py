"""The command line: `safe-decode COMMAND ...`.

Knows the runtime's commands, the group of entry points in which other packages register
theirs, and how an error is reported: one line, exit status 2, no traceback. Does not know
what the commands do.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from safe_decode.cli.bench import bench
from safe_decode.cli.bundles import inspect, verify_certificate
from safe_decode.cli.capabilities import capabilities
from safe_decode.cli.command import OTHER, PANELS, panel_of
from safe_decode.cli.console import print_error
from safe_decode.cli.fetch import fetch
from safe_decode.cli.generate import generate
from safe_decode.cli.proxy import proxy
from safe_decode.cli.replay import replay, show
from safe_decode.cli.serve import serve
from safe_decode.cli.signatures import sign, verify_signature
from safe_decode.errors import SafeDecodeError

__all__ = ["GROUP", "app", "main"]


class ReportingGroup(TyperGroup):
    """A group whose commands' own errors are reported rather than traced."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - the type is private to typer
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except SafeDecodeError as error:
            print_error(error)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="safe-decode",
    cls=ReportingGroup,
    help="Generation-time safety re-evaluation for language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OWN: dict[str, Callable[..., object]] = {
    "fetch": fetch,
    "generate": generate,
    "serve": serve,
    "proxy": proxy,
    "bench": bench,
    "inspect": inspect,
    "verify-certificate": verify_certificate,
    "sign": sign,
    "verify-signature": verify_signature,
    "replay": replay,
    "show": show,
    "capabilities": capabilities,
}
"""The runtime's own commands, by name."""

GROUP = "safe_decode.commands"
"""Entry points of this group are commands: their name, and `module:function`."""


def _registered() -> dict[str, Callable[..., object]]:
    """Load the commands that installed packages register, the workbench's among them."""
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    return {point.name: point.load() for point in points}


def _add_commands(to: typer.Typer) -> None:
    """Add every command, in the order of their purposes."""
    order: tuple[str, ...] = (*PANELS, OTHER)
    every = {**_registered(), **OWN}  # no package replaces a command of the runtime
    for name, function in sorted(every.items(), key=lambda one: order.index(panel_of(one[1]))):
        to.command(name, rich_help_panel=panel_of(function))(function)


_add_commands(app)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
