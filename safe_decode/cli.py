"""The command line: `safe-decode COMMAND ...`.

Knows the commands and how an error is reported: one line, exit status 2, no traceback.
Does not know what the commands do.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from safe_decode.commands.bundles import inspect, verify_certificate
from safe_decode.commands.capabilities import capabilities
from safe_decode.commands.demo import demo
from safe_decode.commands.generate import generate
from safe_decode.commands.locate import locate
from safe_decode.commands.output import print_error
from safe_decode.commands.serve import serve
from safe_decode.errors import SafeDecodeError

__all__ = ["app", "main"]


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
app.command("demo")(demo)
app.command("inspect")(inspect)
app.command("verify-certificate")(verify_certificate)
app.command("locate")(locate)
app.command("serve")(serve)
app.command("capabilities")(capabilities)


def main() -> None:
    """Run the command line."""
    app()
