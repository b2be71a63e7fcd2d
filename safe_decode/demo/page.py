"""Drawing duels and figures as one self-contained page.

Knows the template and the little geometry of the charts. Does not know models; takes the
plain data of `view` and `counts`. The template escapes every value; the page asks for
nothing from outside and forbids itself to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING

from safe_decode.demo.counts import SceneFigures
from safe_decode.demo.scenes import SCENES
from safe_decode.demo.view import Duel, Side
from safe_decode.trace.risk import BANDS, band_of
from safe_decode.trace.shown import Mark, ShownToken, visible

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["Chart", "TokenRun", "chart_of", "page", "runs_of"]

CHART_WIDTH, CHART_HEIGHT = 600.0, 72.0


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Neighbouring tokens that share a mark."""

    mark: Mark
    tokens: tuple[ShownToken, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """The risk of both arms over the tokens, as points of an SVG polyline.

    Attributes:
        bare: Points "x,y x,y ..." of the bare arm.
        guarded: The same of the guarded arm, up to its trip.
        trip: Where the guard tripped, (x, y); None if it did not.
        summary: The chart in words, for who cannot see it.
    """

    bare: str
    guarded: str
    trip: tuple[float, float] | None
    summary: str


def page(
    duels: Sequence[Duel], figures: Sequence[SceneFigures], *, facts: Mapping[str, str]
) -> str:
    """Draw the page.

    Args:
        duels: Prompts with both answers, in the order shown.
        figures: Counts, a row a scene; empty for none.
        facts: What the reader should know about the run, name to value.

    Returns:
        A whole HTML document.
    """
    shown = [
        {
            "scene": SCENES[duel.prompt.scene],
            "duel": duel,
            "arms": (("Bare", duel.bare), ("Guarded", duel.guarded)),
            "chart": chart_of(duel),
        }
        for duel in duels
    ]
    return _template().render(
        shown=shown,
        figures=figures,
        facts=facts,
        scenes=SCENES,
        bands=range(BANDS),
        width=CHART_WIDTH,
        height=CHART_HEIGHT,
    )


def runs_of(tokens: Sequence[ShownToken]) -> tuple[TokenRun, ...]:
    """Group neighbouring tokens by mark, in order."""
    return tuple(TokenRun(mark, tuple(run)) for mark, run in groupby(tokens, key=lambda t: t.mark))


def chart_of(duel: Duel) -> Chart:
    """Lay out the risk of both arms; tokens without a score are left out."""
    bare = _risks(duel.bare)
    guarded = _risks(duel.guarded)
    step = CHART_WIDTH / max(len(bare), len(guarded), 2)
    trip = None
    told = "the guard does not trip"
    if duel.guarded.tripped and guarded:
        trip = (round(step * (len(guarded) - 0.5), 1), round(CHART_HEIGHT * (1 - guarded[-1]), 1))
        told = f"the guard trips at token {len(guarded)}, risk {guarded[-1]:.2f}"
    peak = f"{max(bare):.2f}" if bare else "unknown"
    return Chart(
        bare=_points(bare, step),
        guarded=_points(guarded, step),
        trip=trip,
        summary=f"Risk by token. Bare peaks at {peak}; {told}. The threshold is at 0.50.",
    )


def _risks(side: Side) -> list[float]:
    watched = [t for t in side.tokens if t.mark in ("prefill", "plain", "dropped", "trip")]
    return [t.risk for t in watched if t.risk is not None]


def _points(risks: Sequence[float], step: float) -> str:
    return " ".join(
        f"{step * (i + 0.5):.1f},{CHART_HEIGHT * (1 - risk):.1f}" for i, risk in enumerate(risks)
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["band"] = band_of
    environment.filters["visible"] = visible
    environment.filters["runs"] = runs_of
    source = resources.files("safe_decode.demo").joinpath("page.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8"))
