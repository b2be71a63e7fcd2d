"""`safe-decode check`: live traces against the calibration, and whether to calibrate again.

Knows the options, the exit status and how figures are shown. Does not know the tests.
"""

from __future__ import annotations

import math
from collections import Counter
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
    others = [one for one in loaded.certificates if _differs(one, certificate)]
    found = check_live(traces, certificate, bundle=loaded.digest, others=others)
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
    """Find the certificate that most traces were judged by, of whichever format and cap."""
    judged = Counter(trace.header.threshold for trace in traces)
    alpha = bundle.default_alpha if options.alpha is None else options.alpha
    alike = [
        one
        for one in bundle.certificates
        if one.population == options.population
        and math.isclose(one.alpha, alpha)
        and judged[one.threshold]
    ]
    if not alike:
        return bundle.certificate(alpha, options.population)
    return max(alike, key=lambda one: judged[one.threshold])


def _differs(one: Certificate, own: Certificate) -> bool:
    """Say whether traces that one certificate judged say nothing of another."""
    from safe_decode.certificate_choice import BEGUN

    if (one.population, one.threshold) == (own.population, own.threshold):
        return False
    is_of_another_cap = one.envelope.max_new_tokens != own.envelope.max_new_tokens
    is_alike = one.population == own.population and one.dtype == own.dtype
    return (is_alike and is_of_another_cap) or one.population == BEGUN
