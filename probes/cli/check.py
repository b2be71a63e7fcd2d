"""`safe-decode check`: live traces against the calibration, and whether to calibrate again.

Knows the options, the exit status and how figures are shown. Does not know the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probes.cli.options import show_facts
from safe_decode.cli.console import console, print_json
from safe_decode.cli.generate import Alpha, BundlePath

__all__ = ["check"]


def check(
    trace: Annotated[
        list[Path], typer.Option(help="Traces of live responses; may be given several times.")
    ],
    bundle: BundlePath = None,
    alpha: Alpha = None,
    population: Annotated[
        str, typer.Option(help="Population whose calibration they are compared with.")
    ] = "benign",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare live traces with the calibration; exit status 1 says: calibrate again."""
    from probes.calibration.drift import check_live
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.trace.schema import read_traces

    loaded = ProbeBundle.load(bundle or artefact("bundle"))
    traces = [one for path in trace for one in read_traces(path)]
    found = check_live(traces, loaded.certificate(alpha, population), bundle=loaded.digest)
    if as_json:
        print_json({"bundle": loaded.digest, "population": population, **found.to_json()})
    else:
        facts = found.to_json()
        reasons = facts.pop("reasons")
        show_facts("Live traces", facts)
        for reason in reasons:
            console().print(f"- {reason}", soft_wrap=True)
    if found.reasons:
        raise typer.Exit(1)
