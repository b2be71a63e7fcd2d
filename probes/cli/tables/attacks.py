"""Records of attacks as tables, a page and claims: what the terminal and the page both show.

Knows how records are summed up and written. Does not know how an attack works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from probes.cli.tables.figures import share_rows

if TYPE_CHECKING:
    from probes.attacks.results import Record
    from probes.metrics.intervals import Proportion

__all__ = ["attack_page", "attack_tables"]


def attack_tables(
    records: Sequence[Record], rows: Sequence[Mapping[str, object]]
) -> dict[str, list[dict[str, str]]]:
    """Return tables by title: what each attack achieves, how strong it is, where it succeeds.

    Args:
        records: One for each behaviour, threat and arm.
        rows: Figures of each threat and arm, from `probes.attacks.results.rows_of`.
    """
    from probes.attacks.results import adequacy, named_shares

    tables = {
        "What an attack achieves": [
            {name: _cell(value) for name, value in row.items()} for row in rows
        ],
        "Is the attack strong enough to speak of": [
            {
                "check": check.what,
                "found": check.value,
                "met": "not run" if check.met is None else ("yes" if check.met else "no"),
            }
            for check in adequacy(records)
        ],
    }
    for threat in sorted({record.threat for record in records if record.arm == "guarded"}):
        shares = named_shares(records, threat, "guarded")
        tables[f"{threat} against the guard, by category"] = share_rows(
            shares, "category", "behaviours that gave way"
        )
    return tables


def attack_page(
    records: Sequence[Record],
    tables: Mapping[str, Sequence[Mapping[str, str]]],
    claims: Sequence[str],
    facts: Mapping[str, str],
) -> str:
    """Return a self-contained page: tables, success against budget, claims and facts."""
    from probes.attacks.results import UNITS, curve
    from probes.reports.evaluation_page import page_of
    from probes.reports.evaluation_plots import budget_svg

    pictures = {}
    for threat in sorted({record.threat for record in records}):
        mine = [record for record in records if record.threat == threat]
        arms = list(dict.fromkeys(record.arm for record in mine))
        curves: dict[str, list[tuple[int, Proportion]]] = {
            arm: [(p.budget, p.share) for p in curve([r for r in mine if r.arm == arm])]
            for arm in arms
        }
        pictures[f"{threat}: success against budget"] = budget_svg(curves, unit=UNITS[threat])
    return page_of("Attacks", tables, pictures, facts, notes=claims)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value)
