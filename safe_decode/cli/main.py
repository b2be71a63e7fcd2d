"""The command line: `safe-decode COMMAND ...`.

Knows the runtime's commands, the group of entry points in which other packages register
theirs, and how an error is reported: one line, exit status 2, no traceback. Does not know
what the commands do.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from safe_decode.cli.bench import bench
from safe_decode.cli.bundles import inspect, verify_certificate
from safe_decode.cli.capabilities import capabilities
from safe_decode.cli.console import print_error
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
app.command("generate")(generate)
app.command("inspect")(inspect)
app.command("verify-certificate")(verify_certificate)
app.command("sign")(sign)
app.command("verify-signature")(verify_signature)
app.command("serve")(serve)
app.command("proxy")(proxy)
app.command("capabilities")(capabilities)
app.command("replay")(replay)
app.command("show")(show)
app.command("bench")(bench)

GROUP = "safe_decode.commands"
"""Entry points of this group are commands: their name, and `module:function`."""


def _add_registered(to: typer.Typer) -> None:
    """Add the commands that installed packages register, the workbench's among them."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        to.command(point.name)(point.load())


_add_registered(app)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
