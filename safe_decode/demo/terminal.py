"""Drawing duels and figures in a terminal.

Knows rich, colours and glyphs. Does not know models; takes the plain data of `view` and
`counts`. Colour never stands alone: the trip, what was dropped, what was supplied and
what was forced carry glyphs too, so that they are seen without colour.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from safe_decode.demo.counts import Counts, SceneFigures
from safe_decode.demo.scenes import SCENES
from safe_decode.demo.view import Duel, Side
from safe_decode.trace.risk import band_of
from safe_decode.trace.shown import ShownToken, visible

__all__ = [
    "FIGURES_SAY",
    "FIGURE_COLUMNS",
    "RULE_SAYS",
    "duel_panel",
    "figure_rows",
    "legend",
    "response_text",
]

# From below the threshold (no ground) to far above it. Dark letters on every ground.
_GROUNDS = ("", "on #f4ecc8", "on #f3dc9a", "on #f2b970", "on #ea8a5c", "on #dd5a4f")
_TRIP = "▲TRIP"

FIGURE_COLUMNS = (
    *("scene", "n", "harm bare", "harm guarded", "≤", "refused bare", "refused guarded"),
    *("tripped", "unchanged"),
)
FIGURES_SAY = (
    "Harm: a harmful sentence reached the reader; broken text counts as harm. ≤: one-sided 95 % "
    "bound."
)
RULE_SAYS = (
    "Harm: an answer to a harmful request reached the reader to its end and does not open like a "
    "refusal, by a rule of words. ≤: one-sided 95 % bound."
)
"""What the same columns mean where no oracle reads the answers."""


def legend() -> Text:
    """Explain the colours and glyphs in one line."""
    text = Text("risk  ")
    for band, label in enumerate((" low ", " ", " ", " threshold ", " ", " high ")):
        text.append(label, _ground(band))
    text.append("   ")
    text.append(f" {_TRIP} ", "bold white on #8b1a2b")
    text.append(" the guard trips   ")
    text.append("struck", "strike dim")
    text.append(" taken back   ")
    text.append("«given»", "italic")
    text.append(" prefill   ")
    text.append("›", "bold green")
    text.append("redirected", "green")
    return text


def response_text(tokens: Sequence[ShownToken]) -> Text:
    """Draw a response token by token, coloured by risk."""
    text = Text()
    before = "plain"
    for token in tokens:
        if token.mark == "prefill" and before != "prefill":
            text.append("«", "italic")
        if token.mark != "prefill" and before == "prefill":
            text.append("»", "italic")
        if token.mark == "redirect" and before != "redirect":
            text.append(" ›", "bold green")
        text.append(visible(token.text), _style(token))
        if token.mark == "trip":
            text.append(f" {_TRIP} ", "bold white on #8b1a2b")
        before = token.mark
    if before == "prefill":
        text.append("»", "italic")
    return text


def duel_panel(duel: Duel, *, width: int) -> Panel:
    """Draw one prompt with both answers, side by side where there is room.

    Args:
        duel: What to draw.
        width: Columns of the terminal; below 96 the answers stand one under the other.
    """
    scene = SCENES[duel.prompt.scene]
    head = Text.assemble((visible(duel.prompt.request), "bold"))
    sides = (
        _side("bare", duel.bare, gets="The reader gets all of it."),
        _side("guarded", duel.guarded, gets=None),
    )
    body: RenderableType = Group(*sides)
    if width >= 96:
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(*sides)
        body = grid
    title = Text.assemble((scene.title, "bold"), (f" · {scene.about}", "dim"))
    return Panel(Group(head, Text(), body), title=title, title_align="left", box=box.ROUNDED)


def figure_rows(figures: Sequence[SceneFigures]) -> list[tuple[str, ...]]:
    """Write the counts, a row a scene, for `FIGURE_COLUMNS`."""
    return [_cells(row) for row in figures]


def _cells(row: SceneFigures) -> tuple[str, ...]:
    return (
        SCENES[row.scene].title,
        str(row.n),
        _share(_harm(row.bare), row.n),
        _share(_harm(row.guarded), row.n),
        f"{row.harmful_bound:.1%}",
        _share(row.bare.refusal, row.n),
        _share(row.guarded.refusal, row.n),
        _share(row.tripped, row.n),
        _share(row.unchanged, row.n),
    )


def _harm(counts: Counts) -> int:
    return counts.harmful + counts.broken


def _share(k: int, n: int) -> str:
    return f"{k / n:.1%}"


def _side(name: str, side: Side, *, gets: str | None) -> Panel:
    verdict = f" · {side.verdict}" if side.verdict else ""
    foot = Text()
    if side.tripped and gets is None:
        foot = Text.assemble(("\nThe reader gets: ", "bold"), visible(side.text))
    return Panel(
        Group(response_text(side.tokens), foot) if foot else response_text(side.tokens),
        title=Text(f"{name}{verdict}"),
        title_align="left",
        box=box.MINIMAL if name == "bare" else box.SQUARE,
    )


def _style(token: ShownToken) -> str:
    if token.mark == "prefill":
        return f"italic {_ground(band_of(token.risk))}".strip()
    if token.mark == "dropped":
        return f"strike {_ground(band_of(token.risk))}".strip()
    if token.mark == "trip":
        return f"strike bold {_ground(band_of(token.risk))}".strip()
    if token.mark == "redirect":
        return "green"
    return _ground(band_of(token.risk))


def _ground(band: int) -> str:
    return f"#1b1b1b {_GROUNDS[band]}" if _GROUNDS[band] else ""
