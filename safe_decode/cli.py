"""The command line: `safe-decode COMMAND ...`.

Knows the commands and how an error is reported: one line, exit status 2, no traceback.
Does not know what the commands do.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from safe_decode.commands.ablate import ablate
from safe_decode.commands.attack import attack
from safe_decode.commands.bench import bench
from safe_decode.commands.bundles import inspect, verify_certificate
from safe_decode.commands.calibrate import calibrate
from safe_decode.commands.capabilities import capabilities
from safe_decode.commands.check import check
from safe_decode.commands.demo import demo
from safe_decode.commands.evaluate import evaluate
from safe_decode.commands.export import export
from safe_decode.commands.finetune import finetune
from safe_decode.commands.fit import fit
from safe_decode.commands.framing import framing
from safe_decode.commands.generate import generate
from safe_decode.commands.harvest import harvest
from safe_decode.commands.locate import locate
from safe_decode.commands.output import print_error
from safe_decode.commands.proxy import proxy
from safe_decode.commands.refit import refit
from safe_decode.commands.replay import replay, show
from safe_decode.commands.reproduce import reproduce
from safe_decode.commands.rollout import rollout
from safe_decode.commands.serve import serve
from safe_decode.commands.signatures import sign, verify_signature
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
app.command("sign")(sign)
app.command("verify-signature")(verify_signature)
app.command("locate")(locate)
app.command("serve")(serve)
app.command("proxy")(proxy)
app.command("rollout")(rollout)
app.command("harvest")(harvest)
app.command("fit")(fit)
app.command("calibrate")(calibrate)
app.command("check")(check)
app.command("export")(export)
app.command("evaluate")(evaluate)
app.command("attack")(attack)
app.command("refit")(refit)
app.command("reproduce")(reproduce)
app.command("ablate")(ablate)
app.command("framing")(framing)
app.command("finetune")(finetune)
app.command("capabilities")(capabilities)
app.command("replay")(replay)
app.command("show")(show)
app.command("bench")(bench)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
