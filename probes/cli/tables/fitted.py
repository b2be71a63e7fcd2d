"""What a fit made, as tables: the best candidates, the certificates, what the bundle is worth.

Knows a finished fit and how figures are written. Does not know how it came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.cli.tables.built import FINDS, finds_rows, worth_rows
from probes.cli.tables.facts import show_facts
from probes.cli.tables.figures import print_tables
from safe_decode.cli.console import console
from safe_decode.cli.tables import WordTable, print_table

if TYPE_CHECKING:
    from probes.recipes.bundle import Recipe

__all__ = ["show_fitted"]

_SHOWN = 10


def show_fitted(recipe: Recipe, out: Path) -> None:
    """Print the outcome of a fit."""
    columns = ("sites", "fit", "statistic", "recall", "if late", "AUROC", "delay p90", "hold-back")
    rows = []
    for one in recipe.tried[:_SHOWN]:
        hits = f" x{one['hits']}" if one["hits"] > 1 else ""
        rows.append(
            [
                one["sites"],
                one["way"],
                f"{_statistic(one)}{hits}",
                f"{one['tpr']:.1%}",
                f"{one['late_tpr']:.1%}",
                f"{one['auroc']:.4f}",
                "–" if one["delay_p90"] is None else str(one["delay_p90"]),
                str(one["holdback_tokens"]),
            ]
        )
    print_table(WordTable(columns, rows, "Best on select, which they are chosen by"))
    console().print(f"{len(recipe.tried)} candidates; the first is in the bundle.")
    certified = {
        f"{one.population} at {one.alpha:g}, up to {one.envelope.max_new_tokens} tokens": (
            f"threshold {one.threshold:.4g} (n={one.n}, j={one.j}), {one.evidence.source}"
        )
        for one in recipe.bundle.certificates
    }
    show_facts("Certificates", certified)
    print_tables({"On test, at the certified threshold": worth_rows(recipe.bundle)})
    if finds := finds_rows(recipe.bundle):
        print_tables({FINDS: finds})
    console().print(f"wrote {out}", soft_wrap=True)


def _statistic(one: Mapping[str, Any]) -> str:
    """Name a statistic with its size."""
    kind, window = one["statistic"], one["window"]
    sizes = {
        "mean": str(window),
        "shrunk": str(window),
        "bank": f"{window}, {one['smoothing']:.2f}",
        "top": f"{one['best']} of {window}",
        "cusum": f"{one['drift']:.2f}",
    }
    even = ", even" if one["even"] else ""
    return f"{kind} {sizes.get(kind, format(one['smoothing'], '.2f'))}{even}"
