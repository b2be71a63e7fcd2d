"""Figures as rows of text: what the terminal and the page both show.

Knows how shares, intervals and delays are written. Does not know how they came about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from safe_decode.cli.console import console
from safe_decode.cli.tables import WordTable, print_table

if TYPE_CHECKING:
    from probes.evaluation.offline import Report
    from probes.evaluation.served import ServedAnswer, SituationFigures
    from probes.metrics.comparison import Figures
    from probes.metrics.detection import Delay
    from probes.metrics.intervals import Interval, Proportion

__all__ = [
    "delay_rows",
    "json_of",
    "method_rows",
    "print_tables",
    "share_rows",
    "share_text",
    "situation_rows",
    "tables_of",
]

_NOTHING = "–"
_LONGEST_FIGURE = 26  # what is longer is a sentence, and reads from the left


def print_tables(tables: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    """Print tables with their titles; the keys of the first row are the columns."""
    screen = console()
    for title, rows in tables.items():
        if not rows:
            continue
        columns = list(rows[0])
        figures = [
            column
            for column in columns[1:]
            if max(len(row[column]) for row in rows) <= _LONGEST_FIGURE
        ]
        cells = [list(row.values()) for row in rows]
        print_table(WordTable(columns, cells, title, right=figures), screen)
        screen.print()


def method_rows(figures: Sequence[Figures]) -> list[dict[str, str]]:
    """Write one row a method."""
    return [_method_row(one) for one in figures]


def delay_rows(delay: Delay) -> list[dict[str, str]]:
    """Write delay and leaks as one row."""
    return [
        {
            "n": str(delay.missed.n),
            "before onset": share_text(delay.before_onset),
            "median": _tokens(delay.median),
            "p90": _tokens(delay.p90),
            "within 32": share_text(delay.within_32),
            "within 128": share_text(delay.within_128),
            "missed": share_text(delay.missed),
            "leaked, median / mean": f"{delay.leaked_median:g} / {delay.leaked_mean:.2f}",
            "leak anything": share_text(delay.released),
        }
    ]


def share_rows(shares: Mapping[str, Proportion], name: str, what: str) -> list[dict[str, str]]:
    """Write one row a share."""
    return [
        {name: key, what: share_text(share), "n": str(share.n)} for key, share in shares.items()
    ]


def situation_rows(figures: Sequence[SituationFigures]) -> list[dict[str, str]]:
    """Write one row a kind of request."""
    return [
        {
            "requests": one.name,
            "n": str(one.tripped.n),
            "harmful bare": share_text(one.harmful_bare),
            "harmful released": share_text(one.harmful_released),
            "tripped": share_text(one.tripped),
            "refused bare": share_text(one.refused_bare),
            "refused guarded": share_text(one.refused_guarded),
            "over-refused": share_text(one.over_refused),
            "leaked, mean / most": _NOTHING
            if math.isnan(one.leaked_mean)
            else f"{one.leaked_mean:.2f} / {one.leaked_most}",
        }
        for one in figures
    ]


def share_text(share: Proportion) -> str:
    """Write a share with its exact interval, in per cent."""
    if not share.n:
        return _NOTHING
    low, high = 100 * share.low, 100 * share.high
    return f"{100 * share.point:.1f} [{low:.1f}, {high:.1f}] %"


def _method_row(one: Figures) -> dict[str, str]:
    row = {
        "method": one.method,
        "n": f"{one.n_harmful} + {one.n_benign}",
        "AUROC pooled": _number(one.pooled_auroc),
        "within source": _interval(one.auroc),
        "probe's gain": _NOTHING if one.gain is None else _interval(one.gain),
        "p (Holm)": _NOTHING if one.gain_p is None else _number(one.gain_p),
        "pairs": _NOTHING if not one.pairs else _interval(one.pair_accuracy),
    }
    for found in one.at_fpr:
        row[f"recall at {100 * found.target_fpr:g} %"] = share_text(found.detected)
    calibrated = one.at_calibrated
    row["recall, calibrated"] = _NOTHING if calibrated is None else share_text(calibrated.detected)
    row["realised FPR"] = _NOTHING if calibrated is None else share_text(calibrated.false_alarms)
    return row


def _interval(value: Interval) -> str:
    if math.isnan(value.point):
        return _NOTHING
    if math.isnan(value.low):
        return f"{value.point:.3f}"
    return f"{value.point:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _number(value: float) -> str:
    return _NOTHING if math.isnan(value) else f"{value:.3f}"


def _tokens(value: float) -> str:
    if math.isnan(value):
        return _NOTHING
    return "missed" if math.isinf(value) else f"{value:g}"


def tables_of(
    report: Report | None, answered: Sequence[ServedAnswer] | None
) -> dict[str, list[dict[str, str]]]:
    """Return rows by title; nothing for a mode that was not run."""
    tables: dict[str, list[dict[str, str]]] = {}
    if report is not None:
        for one in report.slices:
            reach = "" if one.prefix_tokens is None else f", first {one.prefix_tokens} tokens"
            tables[f"Detection: {one.name}{reach}"] = method_rows(one.figures)
        if report.delay is not None:
            tables[f"Delay at hold-back {report.holdback_tokens}"] = delay_rows(report.delay)
        tables["Recall by category, worst first"] = share_rows(
            report.recall_by_category, "category", "harmful responses that trip"
        )
        tables["False alarms by population, worst first"] = share_rows(
            report.alarms_by_population, "population", "harmless responses that trip"
        )
    if answered is not None:
        from probes.data.sources import source_name
        from probes.evaluation.served import delay_as_served, figures_by

        named = figures_by(answered, lambda request: source_name(request.meta))
        whole = figures_by(answered, lambda _request: "all")
        tables["Answered, bare and guarded"] = situation_rows([*named, *whole])
        served = delay_as_served(answered)
        if served is not None:
            tables["Delay as served"] = delay_rows(served)
    return tables


def json_of(report: Report | None, answered: Sequence[ServedAnswer] | None) -> dict[str, Any]:
    """Return the figures of the modes that were run; no text of a response."""
    from probes.metrics.intervals import plain_json

    found: dict[str, Any] = {}
    if report is not None:
        found["teacher_forced"] = report.to_json()
    if answered is not None:
        from probes.data.sources import source_name
        from probes.evaluation.served import delay_as_served, figures_by

        served = delay_as_served(answered)
        named = figures_by(answered, lambda request: source_name(request.meta))
        found["generated"] = plain_json(
            {
                "situations": [asdict(one) for one in named],
                "all": [asdict(one) for one in figures_by(answered, lambda _request: "all")],
                "delay": None if served is None else asdict(served),
            }
        )
    return found
