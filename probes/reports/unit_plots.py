"""Located units as figures: counts and shares, a heat map and a scatter as PNG.

Knows categories, layers and how they are drawn. Does not know how units were found.
matplotlib is imported when something is drawn; nothing here touches its global state.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from probes.location.units import CATEGORIES, UnitSet
from probes.reports.figures import require_plots, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["category_counts", "draw_importance", "draw_shares"]

_KINDS = ("attention heads", "MLP neurons")
# Told apart by lightness as well as by hue; complex units, the many, stay in the background.
_COLOURS = {"RU": "#b08ec9", "SCU": "#c1121f", "UCU": "#1d6fb8", "CU": "#c9c9c9"}
_DRAWN = ("CU", "RU", "UCU", "SCU")  # the last lies on top
_DARKEST = 4.0  # a category this many times denser in a layer than in the model


def category_counts(units: UnitSet) -> NDArray[np.int64]:
    """Count units, [layers, 2, 4] int64: heads and neurons, by category.

    Layers run from 0 to the last that holds a unit.
    """
    layers = int(units.layer.max()) + 1 if len(units) else 0
    counts = np.zeros((layers, len(_KINDS), len(CATEGORIES)), dtype=np.int64)
    np.add.at(counts, (units.layer, units.kind, units.category), 1)
    return counts


def draw_shares(units: UnitSet, path: str | os.PathLike[str]) -> None:
    """Draw a heat map layer x category, one for heads and one for neurons.

    A cell's number is the category's share of the layer's units. Its colour compares that
    with the category's share of all layers, so that small categories show their place too.

    Raises:
        ConfigurationError: matplotlib is not installed, or the file cannot be written.
    """
    require_plots()
    from matplotlib.figure import Figure

    counts = category_counts(units)
    figure = Figure(figsize=(8, 1.6 + 0.28 * len(counts)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for kind, axis in enumerate(axes):
        _draw_heat(axis, counts[:, kind], _KINDS[kind])
    axes[0].set_ylabel("layer")
    bar = figure.colorbar(axes[0].images[0], ax=axes, shrink=0.8, extend="max")
    bar.set_label("share in the layer over share in all layers")
    save_figure(figure, path)


def draw_importance(units: UnitSet, path: str | os.PathLike[str]) -> None:
    """Draw I_S against I_U, every unit a point.

    Raises:
        ConfigurationError: matplotlib is not installed, or the file cannot be written.
    """
    require_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    scores = np.concatenate([units.i_s, units.i_u])
    ends = (float(scores.min()), float(scores.max()))
    for kind, axis in enumerate(axes):
        here = units.take(np.flatnonzero(units.kind == kind))
        for category in _DRAWN:
            some = here.only(category)  # type: ignore[arg-type]
            axis.scatter(
                some.i_u,
                some.i_s,
                s=14 if kind == 0 else 6,
                linewidths=0,
                color=_COLOURS[category],
                label=f"{category} ({len(some)})",
                rasterized=True,
            )
        axis.plot(ends, ends, color="0.6", linewidth=0.8, zorder=0)  # I_S = I_U
        # z-scores have tails of hundreds: linear within one deviation, logarithmic beyond.
        axis.set_xscale("symlog", linthresh=1)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_title(_KINDS[kind])
        axis.set_xlabel("I_U, importance for utility (z)")
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[::-1], labels[::-1], frameon=False, markerscale=1.5)
    axes[0].set_ylabel("I_S, importance for safety (z)")
    save_figure(figure, path)


def _draw_heat(axis: Axes, counts: NDArray[np.int64], title: str) -> None:
    in_layer = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    in_model = counts.sum(axis=0) / max(counts.sum(), 1)
    ratio = np.divide(in_layer, in_model, out=np.ones_like(in_layer), where=in_model > 0)
    axis.imshow(ratio, cmap="Purples", vmin=0, vmax=_DARKEST, aspect="auto")
    for layer, row in enumerate(in_layer):
        for category, share in enumerate(row):
            colour = "white" if ratio[layer, category] > 0.6 * _DARKEST else "black"
            text = f"{share:.1%}" if counts[layer].sum() else "–"
            axis.text(category, layer, text, ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(CATEGORIES)), CATEGORIES)
    axis.set_yticks(range(len(counts)))
    axis.set_title(title)
