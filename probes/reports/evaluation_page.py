"""An evaluation as one self-contained page: tables, pictures, the worst responses by token.

Knows which responses are shown and how tokens are coloured. Does not know models or figures'
arithmetic. The page holds texts of the test set: it is for whoever made the bundle. It asks
for nothing from outside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from probes.evaluation.offline import Report
from probes.metrics.comparison import PROBE
from probes.metrics.detection import delays_of
from probes.metrics.intervals import Proportion
from probes.reports.evaluation_plots import coverage_svg, delay_svg, roc_svg, trace_svg
from safe_decode.certificate import certified_threshold
from safe_decode.errors import CertificateError
from safe_decode.typing import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["ShownResponse", "coverage_of", "evaluation_page", "page_of", "worst_responses"]

_ALPHAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class ShownResponse:
    """A response as the page shows it, token by token.

    Attributes:
        kind: `missed` or `false alarm`.
        prompt: The user's last message.
        tokens: Text and risk in 0..1 of every content token.
        onset: Content token of the onset, or None.
        trip: Content token that tripped, -1 for the prompt, None for no trip.
        picture: Its statistic over time, as SVG.
    """

    kind: str
    prompt: str
    tokens: tuple[tuple[str, float], ...]
    onset: int | None
    trip: int | None
    picture: str


def evaluation_page(
    report: Report,
    tokenizer: Tokenizer,
    tables: Mapping[str, Sequence[Mapping[str, str]]],
    *,
    facts: Mapping[str, str],
) -> str:
    """Draw the page.

    Args:
        report: What was found.
        tokenizer: Spells tokens.
        tables: Rows by title, as the command prints them; columns are the keys of the first.
        facts: What the reader should know about the run, name to value.

    Returns:
        A whole HTML document.
    """
    harmful = np.asarray([bool(row.response_harmful) for row in report.test])
    known = [row for row, onset in enumerate(report.onsets) if onset is not None]
    pictures = {"Recall where false alarms are few": roc_svg(report.scores, harmful, first=PROBE)}
    if known:
        onsets = [onset for onset in report.onsets if onset is not None]
        paths = [report.paths[row] for row in known]
        pictures["Delay"] = delay_svg(
            delays_of(paths, onsets, report.certificate.threshold),
            holdback_tokens=report.holdback_tokens,
        )
    alphas, realised = coverage_of(report)
    if alphas:
        pictures["Certificate: promised and realised"] = coverage_svg(
            alphas, realised, delta=report.certificate.delta
        )
    return page_of("Evaluation", tables, pictures, facts, shown=worst_responses(report, tokenizer))


def page_of(
    title: str,
    tables: Mapping[str, Sequence[Mapping[str, str]]],
    pictures: Mapping[str, str],
    facts: Mapping[str, str],
    *,
    shown: Sequence[ShownResponse] = (),
    notes: Sequence[str] = (),
) -> str:
    """Fill the template; every text is escaped, pictures are SVG made here."""
    return _template().render(
        title=title, tables=tables, pictures=pictures, facts=facts, shown=shown, notes=notes
    )


def coverage_of(report: Report) -> tuple[list[float], list[Proportion]]:
    """Count alarms among harmless test responses at thresholds certified for several levels.

    The certificate's own maxima yield the thresholds; levels they cannot support are left out.
    Only responses of the certified population count, where the test set names populations.
    """
    certificate = report.certificate
    harmless = [row for row in range(len(report.test)) if not report.test[row].response_harmful]
    own = [
        row
        for row in harmless
        if report.test[row].meta.get("population", certificate.population) == certificate.population
    ]
    peaks = np.asarray([float(report.paths[row].max()) for row in own])
    alphas, realised = [], []
    for alpha in _ALPHAS if own else ():
        try:
            threshold = certified_threshold(certificate.maxima, alpha, certificate.delta)
        except CertificateError:
            continue
        alphas.append(alpha)
        realised.append(Proportion.of(int((peaks > threshold).sum()), len(peaks)))
    return alphas, realised


def worst_responses(report: Report, tokenizer: Tokenizer) -> list[ShownResponse]:
    """Choose the harmful responses of the lowest and the harmless ones of the highest maximum."""
    peaks = np.asarray([float(path.max()) for path in report.paths])
    threshold = report.certificate.threshold
    harmful = np.asarray([bool(row.response_harmful) for row in report.test])
    order = np.argsort(peaks, kind="stable")
    missed = [row for row in order if harmful[row] and peaks[row] <= threshold][:_SHOWN]
    alarms = [row for row in order[::-1] if not harmful[row] and peaks[row] > threshold][:_SHOWN]
    return [
        *(_shown("missed", int(row), report, tokenizer) for row in missed),
        *(_shown("false alarm", int(row), report, tokenizer) for row in alarms),
    ]


def _shown(kind: str, row: int, report: Report, tokenizer: Tokenizer) -> ShownResponse:
    path, encoded = report.paths[row], report.encoded[row]
    threshold = report.certificate.threshold
    ids = encoded.ids[encoded.turn_start :]
    above = np.flatnonzero(path > threshold)
    return ShownResponse(
        kind=kind,
        prompt=report.test[row].prompt,
        tokens=tuple(
            (
                tokenizer.decode([token], clean_up_tokenization_spaces=False),
                1 / (1 + math.exp(-float(np.clip(score - threshold, -30, 30)))),
            )
            for token, score in zip(ids, path[1:], strict=True)
        ),
        onset=report.onsets[row],
        trip=int(above[0]) - 1 if len(above) else None,
        picture=trace_svg(path, threshold, report.onsets[row]),
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    text = (
        resources.files("probes.reports")
        .joinpath("templates/evaluation.html.jinja")
        .read_text(encoding="utf-8")
    )
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
