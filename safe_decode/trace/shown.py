"""Tokens as a reader sees them: text, risk, and their place in the story of a row.

Knows traces, ids and how ids become pieces of text. Does not know models, tensors, colours or
markup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safe_decode.errors import DataError
from safe_decode.trace.risk import risk_of

if TYPE_CHECKING:
    from safe_decode.trace.schema import SafetyTrace, TraceStep

__all__ = ["Decode", "Mark", "ShownToken", "pieces_of", "shown_tokens", "visible"]

Decode = Callable[[Sequence[int]], str]
"""From ids to their text, special tokens left out."""

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


def pieces_of(ids: Sequence[int], decode: Decode) -> list[str]:
    """Split the text of `ids` into what each id adds to it.

    An id that ends inside a character adds nothing; the id that completes it adds it.

    Returns:
        One piece an id; joined, they are the text of all.
    """
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = decode(ids[:end])
        is_open = whole.endswith("\ufffd") and end < len(ids)
        grown = before if is_open or not whole.startswith(before) else whole
        pieces.append(grown[len(before) :])
        before = grown
    return pieces


def shown_tokens(trace: SafetyTrace, decode: Decode | None) -> list[ShownToken]:
    """Tell a trace token by token, every attempt of it.

    Args:
        trace: With token ids, where there is a decoder.
        decode: The tokenizer's; None: each token is shown as its id.

    Raises:
        DataError: The trace has no token ids to decode.
    """
    from safe_decode.trace.replay import standing_steps  # brings torch, which tables do without

    told = [(step, stands) for step, stands in standing_steps(trace) if step.position > 0]
    ids = [step.token for step, _ in told if step.token is not None]
    if decode is None:
        pieces = ["· " if step.token is None else f"{step.token} " for step, _ in told]
    elif len(ids) != len(told):
        raise DataError("the trace has no token ids to show; write it with --token-ids.")
    else:
        pieces = pieces_of(ids, decode)
    return [
        ShownToken(piece, _risk(step, trace.header.threshold), _mark(step, trace, stands=stands))
        for (step, stands), piece in zip(told, pieces, strict=True)
    ]


def _risk(step: TraceStep, threshold: float) -> float | None:
    is_number = step.statistic == step.statistic
    return risk_of(step.statistic, threshold) if is_number else None


def _mark(step: TraceStep, trace: SafetyTrace, *, stands: bool) -> Mark:
    if step.attempt == 0 and step.position <= trace.end.prefill_tokens:
        return "prefill"
    if step.action == "trip":
        return "trip"
    if step.attempt or step.action == "force":
        return "redirect" if stands else "dropped"
    return "plain" if stands else "dropped"
