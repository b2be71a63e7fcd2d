"""What the maker of a bundle recorded of its worth, read with care.

It stands in the provenance, which nobody vouches for but the maker: what cannot be is passed over.

Knows the records. Does not know how they are put in words for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DetectionBound",
    "MeasuredShare",
    "Worth",
    "finds_in",
    "mapping_of",
    "text_of",
    "worth_in",
]


@dataclass(frozen=True, slots=True)
class MeasuredShare:
    """A share that was counted, with its 95 % interval.

    Attributes:
        hits: Responses that alarm.
        n: Responses.
        low: Lower end of the interval, in [0, 1].
        high: Upper end.
    """

    hits: int
    n: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """The share itself, in [0, 1]."""
        return self.hits / self.n

    def __str__(self) -> str:
        """Write the share with its interval, in per cent."""
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.share:.1f} % (95 % interval {low:.1f} to {high:.1f} %)"


@dataclass(frozen=True, slots=True)
class Worth:
    """What the maker of a bundle measured of it.

    Attributes:
        alpha: Level of the certificate whose threshold was used.
        population: Of which harmless responses the false alarms were counted.
        split: Rows that were measured on.
        recall: Of harmful responses, or None.
        false_alarms: Of harmless responses, or None.
        warnings: In the maker's own words.
    """

    alpha: float
    population: str
    split: str
    recall: MeasuredShare | None
    false_alarms: MeasuredShare | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DetectionBound:
    """What a certified threshold finds at least.

    Attributes:
        responses: Which harmful ones: `harmful`, or `harmful, begun` where their beginning was
            supplied.
        alpha: Of the certificate whose threshold it is.
        tokens: Its cap: what is seen of a response.
        found: Groups that trip.
        n: Groups.
        delta: Chance that the bound does not hold.
        at_least: Lower bound on the share that trips, in [0, 1].
        is_on_policy: Whether the model wrote all of them.
    """

    responses: str
    alpha: float
    tokens: int
    found: int
    n: int
    delta: float
    at_least: float
    is_on_policy: bool

    def __str__(self) -> str:
        """Write the bound with what it rests on."""
        texts = "" if self.is_on_policy else ", texts of others too"
        return (
            f"{100 * self.at_least:.1f} % of {self.responses} responses up to {self.tokens:,} "
            f"tokens ({self.found:,} of {self.n:,} tripped{texts})"
        )


def worth_in(provenance: Mapping[str, Any]) -> Worth | None:
    """Read what was measured; None where nothing is recorded that can be."""
    record = mapping_of(provenance.get("worth"))
    alpha, told = record.get("alpha"), record.get("warnings")
    if not isinstance(alpha, float) or not 0.0 < alpha < 1.0:
        return None
    return Worth(
        alpha=alpha,
        population=text_of(record.get("population")) or "benign",
        split=text_of(record.get("split")) or "unrecorded",
        recall=_share(record.get("recall")),
        false_alarms=_share(record.get("false_alarms")),
        warnings=tuple(one for one in told if isinstance(one, str))
        if isinstance(told, list)
        else (),
    )


def _share(value: object) -> MeasuredShare | None:
    record = mapping_of(value)
    hits, n, low, high = (record.get(name) for name in ("hits", "n", "low", "high"))
    if type(hits) is not int or type(n) is not int or not 0 <= hits <= n or n < 1:
        return None
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return None
    if not 0 <= low <= high <= 1:
        return None
    return MeasuredShare(hits, n, float(low), float(high))


def mapping_of(value: object) -> Mapping[str, Any]:
    """Return a mapping, an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def text_of(value: object) -> str | None:
    """Return a text, None for blanks and anything else."""
    return value if isinstance(value, str) and value.strip() else None


def finds_in(provenance: Mapping[str, Any]) -> tuple[DetectionBound, ...]:
    """Read the bounds on what thresholds find; records that cannot be are passed over."""
    records = provenance.get("finds")
    found = []
    for record in records if isinstance(records, list | tuple) else ():
        try:
            one = DetectionBound(**mapping_of(record))
            is_sound = 0 <= one.found <= one.n and 0 <= one.at_least <= 1 and 0 < one.delta < 1
        except TypeError:
            continue
        if is_sound and isinstance(one.responses, str) and isinstance(one.tokens, int):
            found.append(one)
    return tuple(found)
