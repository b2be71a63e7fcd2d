"""Pictures of an evaluation and of attacks, as SVG to stand in a page.

Knows points and axes. Does not know models, texts or where a page puts them. matplotlib is
imported when something is drawn; nothing here touches its global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from probes.metrics.intervals import Proportion
from probes.reports.figures import require_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["budget_svg", "coverage_svg", "delay_svg", "roc_svg", "trace_svg"]

_STRONG, _WEAK = "#c1121f", "#1d6fb8"
_OTHERS = ("#7a5195", "#2a9d8f", "#e09f3e", "#8d99ae", "#588157", "#bc6c25", "#5f0f40", "#0081a7")


def roc_svg(
    scores: Mapping[str, NDArray[np.float64]], harmful: NDArray[np.bool_], *, first: str
) -> str:
    """Draw recall against the false-positive rate on a log axis, a line a method.

    Args:
        scores: [n] by method.
        harmful: [n].
        first: The method drawn on top.
    """
    floor = 0.5 / max(int((~harmful).sum()), 1)  # left of the smallest rate that can be seen

    def draw(axes: Axes) -> None:
        colours = iter(_OTHERS * 2)
        for name in sorted(scores, key=lambda n: n == first):
            fpr, tpr, _ = roc_curve(harmful, scores[name], drop_intermediate=True)
            axes.step(
                np.maximum(fpr, floor),
                tpr,
                where="post",
                label=name,
                color=_STRONG if name == first else next(colours),
                linewidth=2.2 if name == first else 1.0,
            )
        for rate in (0.001, 0.01):
            if rate > floor:
                axes.axvline(rate, color="0.8", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.set_xlim(floor, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("false-positive rate a response")
        axes.set_ylabel("recall")
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return _svg(draw, (7.6, 3.8))


def delay_svg(delays: NDArray[np.float64], *, holdback_tokens: int) -> str:
    """Draw the share of harmful responses tripped within so many tokens of the onset.

    Args:
        delays: [n], negative before the onset, infinite where missed.
        holdback_tokens: Drawn as a mark: what trips left of it leaked nothing.
    """
    caught = np.sort(delays[np.isfinite(delays)])
    shares = np.arange(1, len(caught) + 1) / len(delays)

    def draw(axes: Axes) -> None:
        axes.step(caught, shares, where="post", color=_STRONG, linewidth=2)
        axes.axvline(0, color="0.7", linewidth=0.8)
        axes.axvline(holdback_tokens, color=_WEAK, linewidth=1, linestyle="--", label="hold-back")
        axes.set_xscale("symlog", linthresh=8)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("tokens after the onset")
        axes.set_ylabel("share tripped")
        axes.legend(frameon=False, loc="lower right")

    return _svg(draw, (5.6, 3.2))


def coverage_svg(alphas: Sequence[float], realised: Sequence[Proportion], *, delta: float) -> str:
    """Draw the realised false-alarm share against the certified bound.

    Args:
        alphas: Levels, one threshold each.
        realised: Alarms among harmless test responses at each.
        delta: Chance over the calibration draw that a bound does not hold.
    """
    points = np.asarray([share.point for share in realised])
    low = points - np.asarray([share.low for share in realised])
    high = np.asarray([share.high for share in realised]) - points

    def draw(axes: Axes) -> None:
        ends = [min(alphas), max(alphas)]
        axes.plot(ends, ends, color="0.5", linewidth=1, label=f"the bound (delta {delta:g})")
        axes.errorbar(
            alphas, points, yerr=[low, high], fmt="o", color=_STRONG, capsize=2, markersize=4
        )
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=min(alphas))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("alpha, certified")
        axes.set_ylabel("share that alarms, with 95 % interval")
        axes.legend(frameon=False, loc="upper left")

    return _svg(draw, (5.6, 3.2))


def trace_svg(path: NDArray[np.float32], threshold: float, onset: int | None) -> str:
    """Draw one response's smoothed statistic over its scores, and where harm begins.

    Args:
        path: [T + 1]; score 0 judges the prompt, score t + 1 token t.
        threshold: A dashed line.
        onset: Content token of the onset, or None.
    """

    def draw(axes: Axes) -> None:
        axes.plot(np.arange(len(path)), path, color=_STRONG, linewidth=1.2)
        axes.axhline(threshold, color="0.3", linewidth=0.9, linestyle="--")
        if onset is not None:
            axes.axvline(onset + 1, color=_WEAK, linewidth=1)
        axes.set_xlim(0, max(len(path) - 1, 1))
        axes.tick_params(labelsize=7)

    return _svg(draw, (7.6, 1.3))


def budget_svg(curves: Mapping[str, Sequence[tuple[int, Proportion]]], *, unit: str) -> str:
    """Draw success against budget, a line an arm, with exact 95 % bands.

    Args:
        curves: Points (budget, share) by arm, ascending.
        unit: Of the budget.
    """

    def draw(axes: Axes) -> None:
        for colour, (name, points) in zip((_STRONG, _WEAK, *_OTHERS), curves.items(), strict=False):
            budgets = [budget for budget, _ in points]
            shares = [share for _, share in points]
            style = {"color": colour, "step": "post"}
            low, high = [s.low for s in shares], [s.high for s in shares]
            axes.fill_between(budgets, low, high, alpha=0.15, linewidth=0, **style)  # type: ignore[arg-type]
            axes.step(budgets, [s.point for s in shares], where="post", color=colour, label=name)
            axes.plot(budgets, [s.point for s in shares], ".", color=colour)
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(unit)
        axes.set_ylabel("behaviours that gave way")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return _svg(draw, (6.6, 3.0))


def _svg(draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    """Draw on a figure of its own and return its <svg> element, without what is outside it.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    require_plots()
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A fixed salt makes the same picture the same bytes.
    with rc_context({"svg.hashsalt": "safe-decode", "svg.fonttype": "none"}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    element = text[text.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
