"""The curves of docs/results/location.md: fine-tuning, reasoning direction, depth of alignment.

Knows columns, lines and sentences. Does not know where rows lie. Every function returns
Markdown, and nothing where it is given no rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.docs.markdown import image, mean_sd, percent, table
from probes.analysis.behaviour import LABELS, Outcomes
from probes.reports.study_plots import Curve, draw_curves

__all__ = ["finetuning", "superficial"]

Row = Mapping[str, Any]


def finetuning(
    pilot: Sequence[Row], runs: Sequence[Row], gaps: Sequence[Row], picture: Path
) -> str:
    """Show what each arm keeps, and compare at equal task loss."""
    if not pilot or not runs:
        return ""
    curve = pilot[0]["curve"]
    fell = 100 * pilot[0]["fell"]
    reached = "as wanted" if fell >= 30 else "less than the 30 wanted, so the study is weak"
    parts = [
        f"Benign fine-tuning with nothing frozen took {curve[-1]['step']} steps to lower refusal "
        f"of plain harmful requests by {fell:.0f} points ({reached}); every arm trains for twice "
        "those steps."
    ]
    arms = list(dict.fromkeys(row["arm"] for row in runs))
    cells = []
    for arm in arms:
        own = [row for row in runs if row["arm"] == arm]
        last = [row["curve"][-1] for row in own]
        refusal = [100 * float(np.mean(point["refused"])) for point in last]
        harm = [100 * point["harmful"] for point in last]
        loss = [point["loss"] for point in last]
        cells.append(
            (arm, len(own), own[0]["frozen_entries"], *map(mean_sd, (loss, refusal, harm)))
        )
    columns = ("arm", "seeds", "weights held", "task loss", "refused, %", "harmful, %")
    parts.append("At the end, mean and standard deviation over seeds:")
    parts.append(table(columns, cells))
    rows = gaps[0]["rows"] if gaps else []
    told = [
        (g["arm"], g["against"], g["points"], g["seeds"], [g["losses"][0], g["losses"][-1]])
        for g in rows
    ]
    if told:
        parts.append(
            "Refusal at equal task loss, in points over the other arm: mean with a 95 % interval "
            "(seeds drawn first, prompts within them), over the losses that all runs reach."
        )
        parts.append(table(("arm", "against", "points", "seeds", "losses"), told))
    else:
        parts.append("No task loss is reached by every run, so the arms cannot be compared.")
    curves = [_mean_curve(arm, [r["curve"] for r in runs if r["arm"] == arm]) for arm in arms]
    draw_curves({"": curves}, picture, x_label="task loss", y_label="refused, %")
    parts.append(image("Refusal against task loss, means over seeds", picture))
    return "\n\n".join(parts)


def superficial(
    direction: Sequence[Row],
    divergence: Sequence[Row],
    refusals: Sequence[Row],
    pictures: Path,
    pair: str,
) -> str:
    """Show the reasoning direction and the depth of alignment."""
    parts = []
    if direction:
        parts.append(_direction(direction, pictures, pair))
    if divergence:
        cells = [
            (r["model"], r["on"], len(r["mean"]), 100 * r["first_share"], r["mean"][0], r["n"][0])
            for r in divergence
        ]
        columns = ("model", "read", "positions", "share of the first five, %", "first, nats", "n")
        parts.append("Divergence from the unaligned model, KL(model || unaligned):")
        parts.append(table(columns, cells))
        panels = {
            what: [
                Curve(r["model"], range(len(r["mean"])), r["mean"])
                for r in divergence
                if r["on"] == what
            ]
            for what in dict.fromkeys(r["on"] for r in divergence)
        }
        picture = pictures / f"divergence-{pair}.png"
        draw_curves(panels, picture, x_label="response token", y_label="KL, nats")
        parts.append(image("Divergence by position of the response", picture))
    if refusals:
        parts.append(_refusals(refusals, pictures / f"depth-{pair}.png"))
    return "\n\n".join(parts)


def _direction(direction: Sequence[Row], pictures: Path, pair: str) -> str:
    panels = {}
    for baseline, title in (
        ("none", "states as they are"),
        ("query", "query-only state subtracted"),
    ):
        panels[title] = [
            _lean_curve(
                row["model"], [r for r in row["rows"] if r["baseline"] == baseline], "layer"
            )
            for row in direction
        ]
    blocks = pictures / f"direction-blocks-{pair}.png"
    draw_curves(panels, blocks, x_label="block", y_label="lean to refusing, cosine distance")
    for baseline, title in (
        ("none", "states as they are"),
        ("query", "query-only state subtracted"),
    ):
        panels[title] = [
            _lean_curve(
                row["model"], [r for r in row["rows"] if r["baseline"] == baseline], "tokens"
            )
            for row in direction
        ]
    tokens = pictures / f"direction-tokens-{pair}.png"
    draw_curves(panels, tokens, x_label="own tokens", y_label="lean to refusing, cosine distance")
    openers = " and ".join(f"*{opener}*" for opener in direction[0]["openers"])
    cells = []
    for row in direction:
        for baseline in ("none", "query"):
            own = [r for r in row["rows"] if r["baseline"] == baseline and r["tokens"] > 0]
            means = [
                float(np.mean([r[k][0] for r in own])) for k in ("benign", "malicious", "lean")
            ]
            positive = 100 * float(np.mean([r["lean"][1] > 0 for r in own]))
            cells.append((row["model"], baseline, *means, positive))
    columns = (
        "model",
        "baseline",
        "to benign",
        "to malicious",
        "lean",
        "blocks and tokens above 0, %",
    )
    return "\n\n".join(
        (
            f"Openers {openers}. The lean is the distance to the malicious branch minus that to "
            "the benign one: above 0, the plain query lies closer to refusing.",
            table(columns, cells),
            image("Lean by block, means over own tokens", blocks),
            image("Lean by own tokens, means over blocks", tokens),
        )
    )


def _lean_curve(name: str, rows: Sequence[Row], by: str) -> Curve:
    # The state behind the opener itself is compared with one behind the header: another token.
    kept = [row for row in rows if row["tokens"] > 0] if by == "layer" else list(rows)
    x = sorted({row[by] for row in kept})
    columns = [[row["lean"] for row in kept if row[by] == value] for value in x]
    means = [[float(np.mean([lean[i] for lean in column])) for column in columns] for i in range(3)]
    return Curve(name, x, means[0], means[1], means[2])


def _refusals(refusals: Sequence[Row], picture: Path) -> str:
    depths = sorted({row["depth"] for model in refusals for row in model["rows"]})
    cells, curves = [], []
    for model in refusals:
        found = {r["depth"]: Outcomes({k: r[k] for k in LABELS}) for r in model["rows"]}
        shares = {depth: outcomes.share("refusal") for depth, outcomes in found.items()}
        cells.append(
            [model["model"], *(percent(shares[d]) if d in shares else None for d in depths)]
        )
        own = [d for d in depths if d in shares]
        y, low, high = (
            [100 * getattr(shares[d], part) for d in own] for part in ("point", "low", "high")
        )
        curves.append(Curve(model["model"], [math.log2(d + 1) for d in own], y, low, high))
    draw_curves(
        {"": curves}, picture, x_label="log2(1 + tokens begun)", y_label="refused behind them, %"
    )
    columns = ("model", *(f"{depth} tokens" for depth in depths))
    return "\n\n".join(
        (
            "Refused, per cent, when the answer has been begun by so many tokens:",
            table(columns, cells),
            image("Refusal against the depth of a begun answer", picture),
        )
    )


def _mean_curve(name: str, curves: Sequence[Sequence[Row]]) -> Curve:
    length = min(len(curve) for curve in curves)
    loss = [float(np.mean([c[i]["loss"] for c in curves])) for i in range(length)]
    refused = [[100 * float(np.mean(c[i]["refused"])) for c in curves] for i in range(length)]
    middle = [float(np.mean(values)) for values in refused]
    return Curve(name, loss, middle, [min(v) for v in refused], [max(v) for v in refused])
