"""What is shown of a duel: plain data, made once, drawn by terminal and page alike.

Knows sides; tokens as a reader sees them are in `trace.shown`. Does not know models, tensors,
colours or markup.
"""

from __future__ import annotations

from dataclasses import dataclass

from safe_decode.demo.scenes import DemoPrompt
from safe_decode.trace.shown import ShownToken

__all__ = ["Duel", "Side"]


@dataclass(frozen=True, slots=True)
class Side:
    """One arm's response.

    Attributes:
        tokens: Everything the model wrote and was given, in order.
        text: What the reader gets.
        tripped: Whether the guard tripped (on the bare side: would have).
        verdict: What the judge says of `text`; None without a judge.
    """

    tokens: tuple[ShownToken, ...]
    text: str
    tripped: bool
    verdict: str | None = None


@dataclass(frozen=True, slots=True)
class Duel:
    """One prompt answered by the bare and by the guarded model."""

    prompt: DemoPrompt
    bare: Side
    guarded: Side
