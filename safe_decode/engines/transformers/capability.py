"""A row of the table of capabilities, and how rows are written.

Knows what a row says. Does not know any option; those are in `capability_table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "EFFECTS",
    "Capability",
    "Effect",
    "Status",
    "ignored",
    "installed",
    "moves",
    "refused",
    "rows",
    "served",
]

Status = Literal["supported", "installed", "ignored", "served", "refused"]
"""installed: supported inside `with decoder.installed():`, refused outside. ignored: has no
effect in the supported modes, in bare `generate` neither. served: an option of requests to the
server; the library refuses it."""

Effect = Literal["same", "shortens", "certified", "sampled", "voids", "refused"]

EFFECTS: dict[Effect, str] = {
    "same": "stays valid: the same responses, in exact arithmetic",
    "shortens": "stays valid: a shorter response has no larger maximum",
    "certified": "valid at the certified value",
    "sampled": "valid at the certified value; without meaning in greedy decoding",
    "voids": "void",
    "refused": "",
}
"""What the use of an option does to the certificate of a call, in the words of the table."""


@dataclass(frozen=True)
class Capability:
    """One row of the table.

    Attributes:
        feature: The option as users write it: an argument of `generate`, a key of the
            generation configuration, a property of the model, or a state of torch.
        status: What becomes of a call that uses it.
        effect: What becomes of the certificate of a call that runs, see `EFFECTS`.
        reason: Why it is refused, or what to know about it.
        instead: What to do instead; empty where it is supported.
        neutral: Values that do not use the feature; None never does.
        eager: Why it is refused inside `decoder.installed()`; empty where it is not.
        voiding: Values among `neutral` that depart from a certificate all the same.
    """

    feature: str
    status: Status
    effect: Effect
    reason: str = ""
    instead: str = ""
    neutral: tuple[object, ...] = ()
    eager: str = ""
    voiding: tuple[object, ...] = ()

    def is_used_by(self, value: object) -> bool:
        """Say whether `value` uses the feature."""
        if value is None:
            return False
        plain = isinstance(value, (bool, int, float, str))
        return not (plain and any(value == n for n in self.neutral))

    def departs_with(self, value: object) -> bool:
        """Say whether `value` departs from what a certificate without a record of it covers."""
        if isinstance(value, (list, tuple, dict)) and not value:
            return False
        plain = isinstance(value, (bool, int, float, str))
        return self.is_used_by(value) or (plain and any(value == v for v in self.voiding))


def rows(effect: Effect, reason: str, *features: str) -> list[Capability]:
    """Make rows of options that are guarded, and say what each does to a certificate."""
    return [Capability(feature, "supported", effect, reason) for feature in features]


def moves(effect: Effect, reason: str, **features: tuple[object, ...]) -> list[Capability]:
    """Make rows of guarded options, each with the values that do not use it."""
    return [Capability(f, "supported", effect, reason, neutral=n) for f, n in features.items()]


def installed(reason: str, *features: str) -> list[Capability]:
    """Make rows of what works inside `decoder.installed()` alone."""
    instead = "call inside `with decoder.installed():`, one session at a time"
    return [Capability(feature, "installed", "same", reason, instead) for feature in features]


def ignored(reason: str, *features: str) -> list[Capability]:
    """Make rows of options without effect."""
    return [Capability(feature, "ignored", "same", reason) for feature in features]


def served(instead: str, **features: tuple[object, ...]) -> list[Capability]:
    """Make rows of options of requests to the server."""
    reason = "an option of requests to the server"
    return [Capability(f, "served", "voids", reason, instead, n) for f, n in features.items()]


def refused(reason: str, instead: str, **features: tuple[object, ...]) -> list[Capability]:
    """Make rows of what is refused, why, and what to do instead."""
    return [Capability(f, "refused", "refused", reason, instead, n) for f, n in features.items()]
