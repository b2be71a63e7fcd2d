"""What a build would do, as tables and as JSON.

Knows a plan and how figures are written. Does not know how it came about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from probes.cli.tables.facts import show_warnings
from probes.cli.tables.figures import print_tables
from safe_decode.cli.console import console

if TYPE_CHECKING:
    from probes.building.counts import SplitCounts
    from probes.building.material import Material
    from probes.building.plan import Plan

__all__ = ["plan_json", "show_plan"]


def show_plan(material: Material, counts: SplitCounts, plan: Plan, warnings: list[str]) -> None:
    """Print what each split gets and how much there is to do."""
    print_tables({"What each split gets": counts.rows()})
    console().print(
        f"{plan.answers:,} answers to generate, up to {plan.generated_tokens:,} tokens; "
        f"{plan.read_tokens:,} tokens to read.",
        soft_wrap=True,
    )
    show_warnings(material.readings, warnings)


def plan_json(
    material: Material, counts: SplitCounts, plan: Plan, warnings: list[str]
) -> dict[str, object]:
    """Return the same for programs."""
    return {
        "counts": counts.to_json(),
        "answers": plan.answers,
        "generated_tokens": plan.generated_tokens,
        "read_tokens": plan.read_tokens,
        "warnings": warnings,
        "data": material.report,
    }
