"""What the calibration responses were: who wrote them, and how far they reach.

A threshold speaks of responses up to a cap. How large a cap the responses support follows
from their *reach*, the largest cap at which their statistic is known. A response that the
model wrote under a recorded cap reaches that cap, whether it was cut there or the model
ended it before: under any lower cap it would have been a part of itself. A text that the
model did not write reaches its own length and no further: that it ends there says nothing of
where the model would have ended.

    on-policy    every draw is the model's own: the cap is the smallest reach.
    off-policy   others wrote some of them: the cap is the largest one that as many draws
                 reach as alpha and delta need, so that they could certify it by themselves.
    unrecorded   nothing is known, so no cap can be recomputed.

Knows lengths and sources. Does not know thresholds, texts or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from safe_decode.errors import CertificateError

__all__ = ["UNRECORDED", "Evidence", "Source"]

Source = Literal["on-policy", "off-policy", "unrecorded"]
"""on-policy: the model wrote every response, as it is certified to be used. off-policy: not
all of them. unrecorded: the bundle does not say, as those of earlier versions."""

_IN_WORDS = {
    "on-policy": "this model's own responses",
    "off-policy": "texts that this model did not write",
    "unrecorded": "responses of which neither writer nor lengths are recorded",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """Writers and lengths of calibration responses, one entry a draw.

    Attributes:
        source: See `Source`.
        lengths: [n] tokens of the draw's shortest response, a supplied beginning included.
        reaches: [n] largest cap at which the draw's statistic is known.

    Raises:
        CertificateError: An unknown source, or numbers that no responses have.
    """

    source: Source = "unrecorded"
    lengths: tuple[int, ...] = ()
    reaches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise CertificateError(
                f"source={self.source!r} is not one of {get_args(Source)}; calibrate again."
            )
        if len(self.lengths) != len(self.reaches):
            raise CertificateError(
                f"lengths of {len(self.lengths)} draws stand beside reaches of "
                f"{len(self.reaches)}, wanted one each; calibrate again."
            )
        if (self.source == "unrecorded") != (not self.lengths):
            raise CertificateError(
                f"source={self.source!r} stands beside {len(self.lengths)} lengths; lengths are "
                "recorded with their source, or neither is. Calibrate again."
            )
        for length, reach in zip(self.lengths, self.reaches, strict=True):
            if not 0 <= length <= reach:
                raise CertificateError(
                    f"length={length} and reach={reach} of a draw are impossible, wanted "
                    "0 <= length <= reach; calibrate again."
                )

    @property
    def is_recorded(self) -> bool:
        """Whether lengths and writers are known."""
        return self.source != "unrecorded"

    @property
    def in_words(self) -> str:
        """Name the source for people."""
        return _IN_WORDS[self.source]

    @property
    def lengths_in_words(self) -> str:
        """Say how long the responses were, or that it is not recorded."""
        if not self.lengths:
            return "not recorded"
        ordered = sorted(self.lengths)
        return f"{ordered[0]} to {ordered[-1]} tokens, median {ordered[len(ordered) // 2]}"

    def supported_cap(self, needed: int) -> int | None:
        """Return the largest cap that the draws support; None where nothing is recorded.

        Args:
            needed: Draws that alpha and delta need at least.
        """
        if not self.is_recorded:
            return None
        if self.source == "on-policy":
            return min(self.reaches)
        ordered = sorted(self.reaches, reverse=True)
        return ordered[min(needed, len(ordered)) - 1]


UNRECORDED = Evidence()
