"""What a build made, as tables: worth, certificates, counts, what was tried.

Knows a finished build and how figures are written. Does not know models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probes.cli.tables.figures import share_text, tables_of

if TYPE_CHECKING:
    from probes.building.builder import Built
    from probes.metrics.intervals import Proportion
    from safe_decode.bundle.bundle import ProbeBundle

__all__ = ["build_tables", "finds_rows", "worth_rows"]

_TRIED = 10
FINDS = "What the thresholds find, at least"


def build_tables(built: Built) -> dict[str, list[dict[str, str]]]:
    """Return the tables of the page, rows by title."""
    worth = built.bundle.provenance["worth"]
    detection = tables_of(built.report, None)
    return {
        "What it catches, and what it stops by mistake": worth_rows(built.bundle),
        "Certificates": _certificate_rows(built),
        **({FINDS: finds_rows(built.bundle)} if finds_rows(built.bundle) else {}),
        "By source, at the certified threshold": [
            {"responses": name, "trip": share_text(_proportion(one)), "n": str(one["n"])}
            for name, one in worth["by_source"].items()
        ],
        "What each split held": built.counts.rows(),
        **detection,
        f"Best of {len(built.tried)} candidates, on select": _tried_rows(built.tried),
        "Time": [
            {"step": name, "seconds": f"{seconds:.1f}"} for name, seconds in built.seconds.items()
        ],
    }


def worth_rows(bundle: ProbeBundle) -> list[dict[str, str]]:
    """Write what was counted on the test split."""
    worth = bundle.provenance["worth"]
    recall, alarms = _proportion(worth["recall"]), _proportion(worth["false_alarms"])
    return [
        {
            "question": "harmful responses that trip (recall)",
            "share": share_text(recall),
            "n": str(recall.n),
        },
        {
            "question": f"the model's own {worth['population']} answers that trip",
            "share": share_text(alarms),
            "n": str(alarms.n),
        },
        {"question": "certified false-alarm rate", "share": f"{worth['alpha']:.2%}", "n": ""},
        {
            "question": "answers of at most so many tokens",
            "share": f"{worth['max_new_tokens']:,}",
            "n": "",
        },
    ]


def finds_rows(bundle: ProbeBundle) -> list[dict[str, str]]:
    """Write the certified lower bounds on detection."""
    return [
        {
            "responses": one["responses"],
            "alpha": f"{one['alpha']:g}",
            "tokens": f"{one['tokens']:,}",
            "trip": f"{one['found']:,} of {one['n']:,}",
            "at least": f"{one['at_least']:.1%}",
            "delta": f"{one['delta']:.3g}",
            "source": "on-policy" if one["is_on_policy"] else "off-policy",
        }
        for one in bundle.provenance.get("finds", ())
    ]


def _certificate_rows(built: Built) -> list[dict[str, str]]:
    return [
        {
            "population": one.population,
            "alpha": f"{one.alpha:g}",
            "delta": f"{one.delta:g}",
            "draws": f"{one.n:,}",
            "threshold": f"{one.threshold:.4g}",
            "tokens": f"{one.envelope.max_new_tokens:,}",
            "source": one.evidence.source,
        }
        for one in built.bundle.certificates
    ]


def _tried_rows(tried: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "reads": str(one["sites"]),
            "features": f"{one['features']:,}",
            "fit": str(one["way"]),
            "statistic": str(one["statistic"]) + (", even" if one["even"] else ""),
            "recall": f"{one['tpr']:.1%}",
            "if late": f"{one['late_tpr']:.1%}",
            "AUROC": f"{one['auroc']:.3f}",
        }
        for one in tried[:_TRIED]
    ]


def _proportion(record: Mapping[str, Any]) -> Proportion:
    from probes.metrics.intervals import Proportion

    return Proportion.of(record["hits"], record["n"])
