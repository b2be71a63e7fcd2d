"""Pictures of studies: shares with intervals, curves, arms beside random sets.

Knows axes, bars and lines. Does not know how a figure was measured.
matplotlib is imported when something is drawn; nothing here touches its global state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from probes.reports.figures import require_plots, save_figure

if TYPE_CHECKING:
    from probes.analysis.ablation import AblationResult
    from probes.metrics.detection import Proportion

__all__ = ["Curve", "draw_ablation", "draw_curves", "draw_rates"]

_COLOURS = ("#c1121f", "#1d6fb8", "#2f7d4f", "#8a5a00", "#6d3fa0", "#555555")


class Curve(NamedTuple):
    """One line of a chart.

    Attributes:
        name: In the legend.
        x: Positions.
        y: Values; NaN leaves a gap.
        low: Lower ends of a band; empty for none.
        high: Upper ends of it.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def draw_curves(
    panels: Mapping[str, Sequence[Curve]],
    path: str | os.PathLike[str],
    *,
    x_label: str,
    y_label: str,
) -> None:
    """Draw panels side by side, their lines in the same colours.

    Raises:
        ConfigurationError: matplotlib is not installed, or the file cannot be written.
    """
    require_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    axes = np.atleast_1d(np.asarray(figure.subplots(1, len(panels), sharey=True)))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for curve, colour in zip(curves, _cycled(len(curves)), strict=True):
            axis.plot(curve.x, curve.y, marker=".", color=colour, label=curve.name)
            if len(curve.low):
                axis.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15)
        axis.set_title(title)
        axis.set_xlabel(x_label)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel(y_label)
    save_figure(figure, path)


def draw_rates(
    rows: Sequence[str],
    arms: Mapping[str, Sequence[Proportion]],
    path: str | os.PathLike[str],
    *,
    x_label: str,
) -> None:
    """Draw a share with its interval for every row and arm, as points on horizontal lines.

    Raises:
        ConfigurationError: matplotlib is not installed, or the file cannot be written.
    """
    require_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.34 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for number, ((name, shares), colour) in enumerate(
        zip(arms.items(), _cycled(len(arms)), strict=True)
    ):
        at = np.arange(len(rows)) + 0.22 * (number - (len(arms) - 1) / 2)
        points = np.asarray([100 * share.point for share in shares])
        low = points - [100 * share.low for share in shares]
        high = [100 * share.high for share in shares] - points
        axis.errorbar(
            points,
            at,
            xerr=np.maximum(np.stack([low, high]), 0),
            fmt="o",
            markersize=4,
            color=colour,
            label=name,
        )
    axis.set_yticks(range(len(rows)), [row if len(row) < 70 else f"{row[:67]}..." for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(-2, 102)
    axis.set_xlabel(x_label)
    axis.grid(axis="x", color="0.9")
    if len(arms) > 1:
        axis.legend(frameon=False)
    save_figure(figure, path)


def draw_ablation(
    measured: Sequence[AblationResult], category: str, path: str | os.PathLike[str]
) -> None:
    """Draw every arm that answered: share harmful against perplexity, random sets as a cloud.

    Raises:
        ConfigurationError: matplotlib is not installed, or the file cannot be written.
    """
    require_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    families = dict.fromkeys(row.family for row in measured)
    for family, colour in zip(families, _cycled(len(families)), strict=True):
        rows = [row for row in measured if row.family == family and row.harmful is not None]
        if not rows:
            continue
        axis.scatter(
            [row.perplexity or np.nan for row in rows],
            [100 * row.harmful.share("harmful").point for row in rows if row.harmful],
            s=18 if family.startswith("random") else 60,
            alpha=0.6 if family.startswith("random") else 1.0,
            color=colour,
            marker="*" if family == category else "o",
            label="nothing removed" if family == "whole" else family,
        )
    axis.set_xscale("log")
    axis.set_xlabel("perplexity of benign answers")
    axis.set_ylabel("harmful answers to plain harmful requests, %")
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _cycled(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]
