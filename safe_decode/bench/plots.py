"""Plots of what was measured. Needs matplotlib, from the extra `plots`.

Knows rows of results and how they are drawn. Does not know how they came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.whole_files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]


def plot(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Draw ladders as bars with intervals, growth as points with the fitted line.

    Args:
        rows: Of `ladder_rows` and `growth_rows`.
        target: An image; the ending says which kind.

    Raises:
        UnsupportedError: matplotlib is not installed.
        ConfigurationError: Nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "plots need matplotlib; install it with `pip install 'safe-decode[plots]'`."
        ) from error
    ladders = _grouped(
        [row for row in rows if "arm" in row], ("subject", "mode", "batch", "context")
    )
    growths = _grouped([row for row in rows if "axis" in row], ("axis", "shape"))
    panels = len(ladders) + len(growths)
    if not panels:
        raise ConfigurationError("there is nothing to draw; measure a ladder or --grow.")
    columns = min(3, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, (key, group) in zip(axes, ladders.items(), strict=False):
        _ladder(axis, f"{key[0]}, {key[1]}, batch {key[2]}, context {key[3]}", group)
    for axis, (key, group) in zip(axes[len(ladders) :], growths.items(), strict=False):
        _growth(axis, str(key[0]), group)
    for axis in axes[panels:]:
        axis.axis("off")
    with whole_file(target) as part:
        figure.savefig(part, dpi=110)


def _grouped(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[tuple[object, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _ladder(axis: Axes, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    rungs = [row for row in rows if row["arm"] != "bare"]
    points = [100 * (row["ratio"] - 1) for row in rungs]
    below = [100 * (row["ratio"] - row["ratio_95"][0]) for row in rungs]
    above = [100 * (row["ratio_95"][1] - row["ratio"]) for row in rungs]
    places = range(len(rungs))
    axis.errorbar(points, places, xerr=[below, above], fmt="o", color="#2a6f97", capsize=3)
    axis.axvline(0, color="#888888", linewidth=0.8)
    axis.set_yticks(list(places), [row["arm"] for row in rungs])
    axis.invert_yaxis()
    axis.set_xlabel("added time a token, % of bare")
    axis.set_title(title, fontsize=9)


def _growth(axis: Axes, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    x = [row["value"] for row in rows]
    first = rows[0]
    axis.plot(x, [row["added_us"] for row in rows], "o", color="#2a6f97")
    axis.plot(
        x,
        [first["at_zero_us"] + first["slope_us_per_unit"] * value for value in x],
        color="#c1121f",
        linewidth=1,
    )
    axis.set_xscale("log", base=2)
    axis.set_xlabel(name)
    axis.set_ylabel("added us a token")
    low, high = first["slope_us_95"]
    axis.set_title(
        f"{first['slope_us_per_unit']:.4g} us per unit [{low:.3g}, {high:.3g}]", fontsize=9
    )
