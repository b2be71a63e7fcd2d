"""How located units are shown: a table, JSON, pictures and a page.

Knows counts and streams. Does not know how units are located.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safe_decode.cli.console import console, write_text
from safe_decode.cli.tables import WordTable, print_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from probes.location.units import UnitSet

__all__ = ["draw_located", "located_json", "show_located"]


def draw_located(units: UnitSet, *, plot: Path | None, html: Path | None) -> list[Path]:
    """Write the pictures and the page that were asked for, and say where they are."""
    from probes.reports.location_page import locate_page
    from probes.reports.unit_plots import draw_importance, draw_shares

    drawn = []
    if plot is not None:
        draw_shares(units, plot / "shares.png")
        draw_importance(units, plot / "importance.png")
        drawn.append(plot)
    if html is not None:
        write_text(html, locate_page(units))
        drawn.append(html)
    return drawn


def located_json(units: UnitSet, out: Path) -> dict[str, object]:
    """Return counts, shares and provenance for programs."""
    from probes.location.units import CATEGORIES
    from probes.reports.unit_plots import category_counts

    def named(counts: NDArray[np.int64]) -> dict[str, dict[str, int]]:
        kinds = zip(("heads", "neurons"), counts.tolist(), strict=True)
        return {kind: dict(zip(CATEGORIES, row, strict=True)) for kind, row in kinds}

    counts = category_counts(units)
    layers = [{"layer": layer, **named(here)} for layer, here in enumerate(counts)]
    return {
        "out": str(out),
        "units": len(units),
        "counts": units.counts(),
        "shares": {name: count / len(units) for name, count in units.counts().items()},
        "all": named(counts.sum(axis=0)),
        "layers": layers,
        "provenance": dict(units.provenance),
    }


def show_located(units: UnitSet, out: Path, drawn: Sequence[Path]) -> None:
    """Print the table for people."""
    from probes.location.units import CATEGORIES
    from probes.reports.unit_plots import category_counts

    counts = category_counts(units)
    columns = ("layer", *CATEGORIES, "SCU heads", "SCU neurons")
    critical = CATEGORIES.index("SCU")

    def row(name: str, here: NDArray[np.int64]) -> list[str]:
        shares = here.sum(axis=0) / max(here.sum(), 1)
        cells = [f"{share:.1%}" for share in shares]
        return [name, *cells, *(str(count) for count in here[:, critical])]

    rows = [row(str(layer), here) for layer, here in enumerate(counts)]
    rows.append(row("all", counts.sum(axis=0)))
    title = "Share of a layer's units, and its safety-critical ones"
    print_table(WordTable(columns, rows, title, right=columns, apart={len(counts)}))
    screen = console()
    found = units.provenance["counts"]
    screen.print(
        f"located on {found['refusals']} refusals ({found['distinct_refusals']} distinct) among "
        f"{found['harmful_responses']} responses to harmful prompts, and {found['benign_answers']} "
        f"answers among {found['benign_responses']} to benign ones",
        soft_wrap=True,
    )
    searched = units.provenance.get("search")
    if searched is not None:
        ratios = ", ".join(f"{name} {share:.1%}" for name, share in searched["ratios"].items())
        screen.print(
            f"searched on {searched['counts']['harmful_responses']} other harmful prompts "
            f"and {searched['counts']['benign_answers']} answers: {ratios}",
            soft_wrap=True,
        )
    pictures = "".join(f"; drawn: {path}" for path in drawn)
    screen.print(f"units: {out}{pictures}", soft_wrap=True)
