"""`safe-decode check`: live traces against the calibration, and whether to calibrate again.

Knows the options, the exit status and how figures are shown. Does not know the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probes.cli.tables.facts import show_facts
from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json
from safe_decode.cli.options import Alpha, JsonOptions, NamedBundle

if TYPE_CHECKING:
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.certificate import Certificate
    from safe_decode.trace.schema import SafetyTrace

__all__ = ["check"]


@dataclass(frozen=True, kw_only=True)
class CheckOptions(NamedBundle, JsonOptions):
    """Options of `safe-decode check`."""

    trace: Annotated[
        list[Path],
        typer.Option(help="Traces of live responses, JSON lines. May be given several times."),
    ]
    alpha: Alpha = None
    population: Annotated[
        str, typer.Option(help="Population whose calibration the traces are compared with.")
    ] = "benign"


@command("Evaluate")
def check(options: CheckOptions) -> None:
    """Compare live traces with the calibration; exit status 1 says: calibrate again."""
    from probes.calibration.drift import check_live
    from safe_decode.trace.schema import read_traces

    loaded, population = options.load_bundle(), options.population
    traces = [one for path in options.trace for one in read_traces(path)]
    certificate = _in_force(loaded, options, traces)
    found = check_live(traces, certificate, bundle=loaded.digest)
    if options.as_json:
        print_json({"bundle": loaded.digest, "population": population, **found.to_json()})
    else:
        facts = found.to_json()
        reasons = facts.pop("reasons")
        show_facts("Live traces", facts)
        for reason in reasons:
            console().print(f"- {reason}", soft_wrap=True)
    if found.reasons:
        raise typer.Exit(1)


def _in_force(
    bundle: ProbeBundle, options: CheckOptions, traces: Sequence[SafetyTrace]
) -> Certificate:
    """Find the certificate that the traces were judged by, in whichever number format that was."""
    thresholds = {trace.header.threshold for trace in traces}
    every = [
        bundle.certificate(options.alpha, options.population, dtype)
        for dtype in bundle.dtypes
        if any((c.population, c.dtype) == (options.population, dtype) for c in bundle.certificates)
    ]
    judged = [one for one in every if one.threshold in thresholds]
    return judged[0] if judged else bundle.certificate(options.alpha, options.population)
