"""What is shown of a response: plain data, made once, drawn by terminal and page alike.

Knows tokens as text with a risk and a mark; risk itself is in `trace.risk`. Does not know models,
tensors, colours or markup.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safe_decode.demo.scenes import DemoPrompt

__all__ = ["Duel", "Mark", "ShownToken", "Side", "visible"]

# Characters that reorder what follows them: shown, they would let a model forge its own text.
_REORDERING = {code: "\ufffd" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20) if code != 0x0A}
_HIDDEN = {**_REORDERING, **_CONTROLS, 0x7F: "\u2421", **dict.fromkeys(range(0x80, 0xA0), "\ufffd")}

Mark = Literal["prefill", "plain", "trip", "dropped", "redirect"]
"""prefill: written by the attacker, scored, not released. plain: sampled and released.
trip: the token at which the guard tripped, not released. dropped: written before the trip
and taken back. redirect: written or forced after the trip."""


def visible(text: str) -> str:
    """Replace what a terminal or a page would obey rather than show; line ends stay."""
    return text.translate(_HIDDEN)


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token as a reader sees it.

    Attributes:
        text: The characters that the token adds to the response.
        risk: Risk in [0, 1] of the score that judged it; None where none was taken.
        mark: Its place in the story.
    """

    text: str
    risk: float | None
    mark: Mark


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
