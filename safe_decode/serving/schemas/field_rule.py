"""A row of the table of request fields, and how rows are written.

Knows what a row says. Does not know any field; those are in `field_table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FieldPlace", "FieldRule", "FieldTreatment", "honoured", "ignored", "refused"]

FieldPlace = Literal["chat", "completions", "messages", "responses", "tokens", "message", "part"]
"""Where a field stands: in the body of an endpoint, in a message, in a part of a message."""

FieldTreatment = Literal["honoured", "ignored", "refused"]
"""honoured: does what it says. ignored: accepted, changes nothing, and is named in the header
`x-safe-decode-ignored`. refused: the request ends with 400 that names it."""


@dataclass(frozen=True)
class FieldRule:
    """One row of the table.

    Attributes:
        name: As clients write it.
        places: Where it may stand.
        treatment: What becomes of it.
        why: The reason, or what to know about it; of what is refused, with the remedy.
        neutral: Values of a refused field that ask for what happens anyway; null always does.
        in_strict: Whether an ignored field is accepted with `strict_parameters` too.
        feature: The row of the table of capabilities that says what an honoured field does to
            the certificate; empty where it does nothing to it.
    """

    name: str
    places: tuple[FieldPlace, ...]
    treatment: FieldTreatment
    why: str = ""
    neutral: tuple[object, ...] = ()
    in_strict: bool = False
    feature: str = ""

    def asks_for_nothing(self, value: object) -> bool:
        """Say whether a value asks for what happens anyway."""
        return value is None or any(type(value) is type(n) and value == n for n in self.neutral)


def honoured(
    places: tuple[FieldPlace, ...], why: str, *names: str, **features: str
) -> list[FieldRule]:
    """Make rows of fields that do what they say; `features` name their rows of capabilities."""
    rows = [FieldRule(name, places, "honoured", why) for name in names]
    return rows + [FieldRule(n, places, "honoured", why, feature=f) for n, f in features.items()]


def ignored(
    places: tuple[FieldPlace, ...], why: str, *names: str, in_strict: bool = False
) -> list[FieldRule]:
    """Make rows of fields that are accepted and change nothing."""
    return [FieldRule(name, places, "ignored", why, in_strict=in_strict) for name in names]


def refused(
    places: tuple[FieldPlace, ...], why: str, **neutral: tuple[object, ...]
) -> list[FieldRule]:
    """Make rows of what is refused, each with the values that ask for what happens anyway."""
    return [FieldRule(name, places, "refused", why, values) for name, values in neutral.items()]
