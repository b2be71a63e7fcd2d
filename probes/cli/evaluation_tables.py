"""What `safe-decode evaluate` found, as tables for people and as JSON.

Knows which figures are shown in which table. Does not know options or where responses come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from probes.cli.tables import delay_rows, method_rows, share_rows, situation_rows

if TYPE_CHECKING:
    from probes.evaluation.offline import Report
    from probes.evaluation.served import ServedAnswer

__all__ = ["json_of", "tables_of"]


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
        from probes.evaluation.served import delay_as_served, figures_by
        from probes.evaluation.text_baselines import source_name

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
        from probes.evaluation.served import delay_as_served, figures_by
        from probes.evaluation.text_baselines import source_name

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
