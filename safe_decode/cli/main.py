"""The command line: `safe-decode COMMAND ...`.

Knows the commands and how an error is reported: one line, exit status 2, no traceback.
Does not know what the commands do.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from probes.cli.ablate import ablate
from probes.cli.attack import attack
from probes.cli.calibrate import calibrate
from probes.cli.check import check
from probes.cli.demo import demo
from probes.cli.evaluate import evaluate
from probes.cli.export import export
from probes.cli.finetune import finetune
from probes.cli.fit import fit
from probes.cli.framing import framing
from probes.cli.harvest import harvest
from probes.cli.locate import locate
from probes.cli.refit import refit
from probes.cli.reproduce import reproduce
from probes.cli.rollout import rollout
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
