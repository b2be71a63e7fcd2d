"""What a build made, as one self-contained page: worth, certificates, counts, what was tried.

No text of a prompt or a response stands on it, so that it can travel with the bundle.

Knows a finished build and how it is drawn. Does not know models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probes.building.builder import Built
from probes.metrics.comparison import PROBE
from probes.reports.evaluation_page import coverage_of, page_of
from probes.reports.evaluation_plots import coverage_svg, roc_svg

__all__ = ["build_json", "build_page"]

_TRIED = 10
_HOW_COUNTED = (
    "Recall and false alarms are counted on the test split, at the certified threshold: nothing "
    "was fitted, chosen or calibrated on it. Brackets hold exact 95 % intervals. Responses of "
    "others are read up to the longest answer that is certified."
)


def build_page(
    built: Built, tables: Mapping[str, Sequence[Mapping[str, str]]], facts: Mapping[str, str]
) -> str:
    """Draw the page, a whole HTML document.

    Args:
        built: What was made.
        tables: Rows by title, as the command prints them.
        facts: What the reader should know about the run, name to value.
    """
    report = built.report
    harmful = np.asarray([bool(row.response_harmful) for row in report.test])
    pictures = {"Recall where false alarms are few": roc_svg(report.scores, harmful, first=PROBE)}
    alphas, realised = coverage_of(report)
    if alphas:
        pictures["Certificate: promised and realised"] = coverage_svg(
            alphas, realised, delta=report.certificate.delta
        )
    warnings = [f"Beware: {warning.rstrip('.')}." for warning in built.warnings]
    notes = [_HOW_COUNTED, *warnings]
    return page_of(f"Bundle for {facts['model']}", tables, pictures, facts, notes=notes)


def build_json(built: Built, facts: Mapping[str, str]) -> dict[str, Any]:
    """Return the page's figures for programs."""
    return {
        "bundle": built.bundle.digest,
        "facts": dict(facts),
        "worth": built.bundle.provenance["worth"],
        "warnings": list(built.warnings),
        "counts": built.counts.to_json(),
        "certificates": [
            {
                "population": one.population,
                "alpha": one.alpha,
                "delta": one.delta,
                "n": one.n,
                "threshold": one.threshold,
                "max_new_tokens": one.envelope.max_new_tokens,
                "source": one.evidence.source,
            }
            for one in built.bundle.certificates
        ],
        "evaluation": built.report.to_json(),
        "tried": [dict(one) for one in built.tried[:_TRIED]],
        "seconds": dict(built.seconds),
    }
