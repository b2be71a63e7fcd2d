"""The tables of docs/results/location.md, from rows of the studies' journals.

Knows columns and sentences. Does not know where rows lie. Every function returns Markdown,
and nothing where it is given no rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.docs.markdown import cell, image, percent, table, words
from probes.analysis.ablation import AblationResult
from probes.analysis.motives import Framed
from probes.reports.study_plots import draw_ablation, draw_rates

__all__ = [
    "Row",
    "ablation",
    "alignment_tax",
    "cost",
    "framing",
    "reading",
    "stability",
]

Row = Mapping[str, Any]


def ablation(
    arms: Sequence[Row], rises: Sequence[Row], searches: Sequence[Row], picture: Path
) -> str:
    """Show what goes with the units, beside random sets."""
    if not arms:
        return ""
    parts = [
        "Outcomes of plain harmful requests, per cent; utility as benign requests answered well "
        "and as perplexity of benign answers; margin: log odds that the first token begins a "
        "refusal."
    ]
    shown = []
    for row in arms:
        measured = AblationResult.from_json(row)
        if measured.family.startswith("random") or measured.harmful is None:
            continue
        harmful = measured.harmful
        shares = [100 * harmful.share(n).point for n in ("refusal", "harmful", "broken")]
        kept = None if measured.benign is None else 100 * measured.benign.share("benign").point
        name = "nothing" if measured.family == "whole" else measured.name
        cells = [row["how"], name, measured.n_units, *shares, kept, measured.perplexity]
        shown.append([*cells, measured.margin])
    columns = ("located by", "removed", "units", "refused", "harmful", "broken")
    parts.append(table((*columns, "benign kept", "perplexity", "margin"), shown))
    parts.append(
        "The located set against random sets: rise of the harmful share in points over the whole "
        "model, perplexity as a ratio to the whole model's, fall of the margin. p counts random "
        "sets that do at least as much."
    )
    parts.append(_rises(rises))
    for row in searches:
        ratios = ", ".join(f"{k} {100 * v:.1f} %" for k, v in row["ratios"].items())
        passed = "none passed" if not row["ratios"]["safety"] else "passed"
        parts.append(f"Ratios searched with the metric {row['variant']}: {ratios} (SCU: {passed}).")
    first = [row for row in arms if row["how"] == arms[0]["how"]]
    draw_ablation([AblationResult.from_json(row) for row in first], "SCU", picture)
    parts.append(image("Harm and perplexity without each set of units", picture))
    return "\n\n".join(parts)


def _rises(rises: Sequence[Row]) -> str:
    rows = [
        (
            row["how"],
            row["family"],
            row["sets"],
            row["harmful_points"],
            row["random_points"],
            row["p_harmful"],
            row["perplexity_ratio"],
            row["random_perplexity_ratio"],
            row["margin_fall"],
            row["random_margin_fall"],
            row["margin_sets"],
            row["p_margin"],
        )
        for row in rises
    ]
    columns = ("located by", "against", "sets", "harmful, points", "of random: median, 95th, max")
    more = ("p of harm", "perplexity", "of random", "margin falls", "of random sets")
    last = ("random sets of the margin", "p of the margin")
    return table((*columns, *more, *last), rows)


def stability(rows: Sequence[Row]) -> str:
    """Show how far two locations agree, beside chance."""
    if not rows:
        return ""
    cells = [
        (r["compared"], r["category"], r["n_first"], r["n_second"], r["iou"], r["chance"])
        + (r["chance_high"],)
        for r in rows[0]["rows"]
    ]
    columns = ("compared", "category", "units", "units", "IoU", "chance", "chance, 95th")
    return table(columns, cells)


def alignment_tax(rows: Sequence[Row]) -> str:
    """Show what each budget gains and loses."""
    if not rows:
        return ""
    summary = rows[0]["rows"]
    names = [name for name in summary[0] if name not in ("arm", "trained_entries", "seeds")]
    cells = []
    for row in summary:
        changes = [_change(row[name]) for name in names]
        cells.append((row["arm"], row["trained_entries"], *changes))
    before = ", ".join(f"{words(n)} {cell(summary[0][n]['before'])}" for n in names)
    columns = ("trained", "weights", *map(words, names))
    return "\n\n".join(
        (
            f"Before: {before}. Changes after the same steps, mean ± standard deviation over "
            f"{summary[0]['seeds']} seeds:",
            table(columns, cells),
        )
    )


def reading(places: Sequence[Row], verdicts: Sequence[Row]) -> str:
    """Show what each place is worth to a probe, and whether location is credited."""
    if not places:
        return ""
    counts = sorted({row["count"] for row in places if row["count"]})
    names = list(dict.fromkeys(row["place"] for row in places if row["family"] != "random"))
    cells: list[list[object]] = []
    for name in names:
        found = {row["count"]: row["auroc"] for row in places if row["place"] == name}
        if 0 in found:
            everything = next(row for row in places if row["place"] == name)
            cells.append([f"{name} ({everything['features']})", *[found[0]] * len(counts)])
        else:
            cells.append([name, *(found.get(count) for count in counts)])
    lots = {
        c: [r["auroc"] for r in places if r["family"] == "random" and r["count"] == c]
        for c in counts
    }
    cells.append(["random, matched: median", *(float(np.median(lots[c])) for c in counts)])
    cells.append(["random, matched: 95th", *(float(np.quantile(lots[c], 0.95)) for c in counts)])
    parts = [
        "AUROC on test of the largest smoothed score of a response, equal features, fitter and "
        "grid:",
        table(("read at", *(f"{count} features" for count in counts)), cells),
    ]
    for row in verdicts[0]["rows"] if verdicts else ():
        word = "is credited" if row["location_credited"] else "is not credited"
        parts.append(
            f"At {row['count']} features location {word}: {row['located']:.4f} against "
            f"{row['random_95']:.4f}, the 95th percentile of random sets; {row['best_residual']} "
            f"(chosen on select) reaches {row['best_residual_auroc']:.4f}."
        )
    return "\n\n".join(parts)


def cost(rows: Sequence[Row]) -> str:
    """Show what locating costs beside bare forwards."""
    if not rows:
        return ""
    row = rows[0]
    cells = [
        ("bare forwards", row["bare_seconds"], 1.0, row["bare_peak_bytes"] / 2**20),
        ("locate", row["locate_seconds"], row["ratio"], row["locate_peak_bytes"] / 2**20),
    ]
    word = "met" if row["met"] else "missed"
    return "\n\n".join(
        (
            table(("pass", "seconds, median", "ratio", "peak memory, MiB"), cells),
            f"{row['tokens']:,} tokens of {row['responses']} responses, {row['threads']} threads; "
            f"ratios of single passes {cell([row['ratio_low'], row['ratio_high']])}. "
            f"The target of {row['target']} is {word}.",
        )
    )


def framing(rows: Sequence[Row], picture: Path) -> str:
    """Show the refusal rate motive by motive, bare and guarded."""
    framed = [Framed.from_json(row) for row in rows]
    cells = []
    for row in framed:
        stopped = row.stopped_guarded
        cells.append(
            (
                _motive(row),
                row.bare.outcomes.n,
                percent(row.refused_bare),
                percent(row.bare.outcomes.share("harmful")),
                None if stopped is None else percent(stopped),
            )
        )
    arms = {"bare: refused": [row.refused_bare for row in framed]}
    guarded = [row.stopped_guarded for row in framed]
    if None not in guarded:
        arms["guarded: refused or cut"] = [share for share in guarded if share is not None]
    draw_rates([_motive(r) for r in framed], arms, picture, x_label="of the same requests, %")
    columns = ("motive", "n", "refused, bare, %", "harmful, bare, %", "refused or cut, guarded, %")
    return table(columns, cells) + "\n\n" + image("Refusal by motive", picture)


def _change(figure: Mapping[str, Any]) -> str:
    spread = "" if figure["sd"] is None else f" ± {cell(figure['sd'])}"
    return f"{figure['gained']:+.3f}{spread}"


def _motive(row: Framed) -> str:
    text = row.motive.replace("{request}", "…")
    return "no motive" if text == "…" else text
