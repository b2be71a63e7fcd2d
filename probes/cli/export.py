"""`safe-decode export`: a bundle as ONNX graphs, held to torch and NumPy before it is told.

Knows the options and the tolerance. Does not know graphs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from probes.cli.tables.facts import show_facts
from safe_decode.cli.command import command
from safe_decode.cli.console import print_json, require_place, working
from safe_decode.cli.options import Alpha, JsonOptions, NamedBundle
from safe_decode.errors import ConfigurationError

__all__ = ["TOLERANCE", "export"]

TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class ExportOptions(NamedBundle, JsonOptions):
    """Options of `safe-decode export`."""

    out: Annotated[Path, typer.Option(help="Directory that the graphs are written to.")]
    alpha: Alpha = None
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest answer, in tokens: the smallest certified length that covers it decides "
            "the threshold. Without it: the largest.",
        ),
    ] = None
    steps: Annotated[
        int,
        typer.Option(
            min=1, help="Random steps over which onnxruntime, torch and NumPy are compared."
        ),
    ] = 10_000


@command("Tools")
def export(options: ExportOptions) -> None:
    """Export the probe, and the probe with its monitor, as ONNX."""
    out, steps = options.out, options.steps
    require_place(out.parent / "file")
    from probes.export.onnx import export_onnx
    from probes.export.parity import agreement

    loaded = options.load_bundle()
    files = export_onnx(loaded, out, alpha=options.alpha, tokens=options.tokens)
    with working(f"Comparing over {steps:,} steps"):
        found = agreement(
            loaded,
            out,
            alpha=options.alpha,
            tokens=options.tokens,
            steps=steps,
            tolerance=TOLERANCE,
        )
    if found.largest > TOLERANCE or found.flags_differ:
        raise ConfigurationError(
            f"onnxruntime, torch and NumPy differ by {found.largest:.2g} and in "
            f"{found.flags_differ} flags, wanted at most {TOLERANCE:g} and none; do not serve "
            f"what is in {out}, and try another version of onnxruntime."
        )
    facts = {"bundle": loaded.digest, "files": [str(file) for file in files], **asdict(found)}
    if options.as_json:
        print_json(facts)
    else:
        show_facts("ONNX", facts, out)
