"""What the rows of a session have gone through, on the host, as their records need it.

Knows scores that were given and where a row came from. Does not know how rows are judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from safe_decode.errors import GuardError, NonFiniteError
from safe_decode.policy.self_check import Look
from safe_decode.session.records import RowRecord, Trip
from safe_decode.session.trip_detector import TripDetector

__all__ = ["Column", "History", "non_finite"]


@dataclass
class Column:
    """The scores of one row.

    Attributes:
        logits: [n][K].
        smoothed: [n] the statistic before its running maximum.
        statistic: [n] its running maximum.
    """

    logits: list[list[float]] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    statistic: list[float] = field(default_factory=list)

    def __add__(self, later: Column) -> Column:
        return Column(
            self.logits + later.logits,
            self.smoothed + later.smoothed,
            self.statistic + later.statistic,
        )

    @property
    def first_broken(self) -> int | None:
        """Find the first score that is NaN or Inf."""
        broken = (i for i, value in enumerate(self.smoothed) if not math.isfinite(value))
        return next(broken, None)

    def record(
        self,
        *,
        scanned: int,
        threshold: float,
        trip: Trip | None,
        error: GuardError | None,
        looks: tuple[Look, ...],
        inside: tuple[bool, ...],
        content: int | None,
    ) -> RowRecord:
        """Write the record of a row.

        Args:
            scanned: Trailing positions of its prompt that were judged.
            threshold: What its statistic was compared with.
            trip: Its trip, if it has tripped.
            error: What failed, if anything did.
            looks: Self-checks of its alarms.
            inside: [n] whether each score lies in a marked span; empty where none are followed.
            content: Tokens of its response where others ended it; None: all that were judged.
        """
        n_scores = len(self.statistic)
        over = (i for i, value in enumerate(self.statistic) if value > threshold)
        return RowRecord(
            scanned=min(scanned, n_scores),
            logits=self.logits,
            smoothed=self.smoothed,
            statistic=self.statistic,
            threshold=threshold,
            alarm=next(over, None),
            trip=trip,
            error=error,
            looks=looks,
            inside=inside,
            ahead=0 if content is None else max(0, n_scores - scanned - content),
        )


class History:
    """The scores of a batch before its present detector was made.

    Args:
        batch: Rows.
    """

    def __init__(self, batch: int) -> None:
        self._past = [Column() for _ in range(batch)]
        self._consumed = [0] * batch

    def consumed(self, row: int, detector: TripDetector) -> int:
        """Count the scores a row has consumed in this session."""
        return self._consumed[row] + detector.consumed(row)

    def columns(self, detector: TripDetector) -> list[Column]:
        """Return the scores of every row so far; one copy to the host for the whole batch."""
        if not detector.n_scores:
            return self._past
        trail = detector.trail()
        return [
            past
            + Column(
                trail.logits[active, row].tolist(),
                trail.smoothed[active, row].tolist(),
                trail.statistic[active, row].tolist(),
            )
            for row, (past, active) in enumerate(
                zip(self._past, trail.active.unbind(1), strict=True)
            )
        ]

    def settle(self, detector: TripDetector) -> None:
        """Take over what a detector has seen; another one goes on from here."""
        batch = range(len(self._past))
        self._consumed = [self.consumed(row, detector) for row in batch]
        self._past = self.columns(detector)

    def rearrange(self, sources: Sequence[int | None]) -> None:
        """Put rows into other places; None: a new row."""
        self._past = [Column() if s is None else self._past[s] for s in sources]
        self._consumed = [0 if s is None else self._consumed[s] for s in sources]


def non_finite(row: int, score: int) -> NonFiniteError:
    """Say that a row's score is NaN or Inf."""
    return NonFiniteError(
        f"row {row} has NaN or Inf at score {score}, wanted finite activations; check the model's "
        "weights and dtype."
    )
