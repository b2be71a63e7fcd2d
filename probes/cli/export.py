"""`safe-decode export`: a bundle as ONNX graphs, held to torch and NumPy before it is told.

Knows the options and the tolerance. Does not know graphs.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from probes.cli.options import show_facts
from safe_decode.cli.console import print_json, require_place, working
from safe_decode.cli.generate import Alpha, BundlePath
from safe_decode.errors import ConfigurationError

__all__ = ["TOLERANCE", "export"]

TOLERANCE = 1e-5


def export(
    out: Annotated[Path, typer.Option(help="Write the graphs to this directory.")],
    bundle: BundlePath = None,
    alpha: Alpha = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Random steps over which the three are compared.")
    ] = 10_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Export the probe, and the probe with its monitor, as ONNX."""
    require_place(out.parent / "file")
    from probes.export.onnx import export_onnx
    from probes.export.parity import agreement
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.demo.embedded_pair import artefact

    loaded = ProbeBundle.load(bundle or artefact("bundle"))
    files = export_onnx(loaded, out, alpha=alpha)
    with working(f"Comparing over {steps:,} steps"):
        found = agreement(loaded, out, alpha=alpha, steps=steps, tolerance=TOLERANCE)
    if found.largest > TOLERANCE or found.flags_differ:
        raise ConfigurationError(
            f"onnxruntime, torch and NumPy differ by {found.largest:.2g} and in "
            f"{found.flags_differ} flags, wanted at most {TOLERANCE:g} and none; do not serve "
            f"what is in {out}, and try another version of onnxruntime."
        )
    facts = {"bundle": loaded.digest, "files": [str(file) for file in files], **asdict(found)}
    if as_json:
        print_json(facts)
    else:
        show_facts("ONNX", facts, out)
