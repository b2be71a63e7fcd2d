"""Which rows have tripped, where they are cut, and what has failed.

This is the one place that says that a row has tripped. Knows policies and monitor states. Does
not know features or how scores come about.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_decode.errors import GuardError, NonFiniteError
from safe_decode.policy.redirect import cut_of
from safe_decode.session.batch_update import Rearrangement
from safe_decode.session.records import SessionRow, Trip
from safe_decode.session.trip_detector import TripDetector

__all__ = ["TripLog"]


class TripLog:
    """The trips of one session.

    Args:
        begun: Scores that each row has when it begins.

    Attributes:
        trips: By row.
        errors: What failed, by row.
        content: Tokens of responses that others have ended, by row.
        parked: [batch] bool, the rows in `trips`, on their device; None: there is none.
    """

    def __init__(self, begun: Sequence[int]) -> None:
        self.trips: dict[int, Trip] = {}
        self.errors: dict[int, GuardError] = {}
        self.content: dict[int, int] = {}
        self.parked: Tensor | None = None
        self._before = list(begun)

    def park(
        self,
        index: int,
        row: SessionRow,
        detector: TripDetector,
        *,
        said: int,
        judged: int,
        error: GuardError | None,
    ) -> None:
        """Record a row's trip.

        Args:
            index: Of the row in the batch.
            row: What holds for it.
            detector: Of its session.
            said: Generated tokens it has, not counting one chosen after the tripping score.
            judged: Generated tokens of it that have a score.
            error: What failed; None: the newest score raised the alarm.
        """
        state, before = detector.state, self._before[index]
        # The newest score passed nothing if it tripped or is NaN; it is absent if the guard failed.
        tripped = 1 if error is None or isinstance(error, NonFiniteError) else 0
        policy = row.policy
        cut = cut_of(
            policy.redirect if error is None else policy.rule.if_guard_fails,
            said=said,
            judged=max(0, min(said, judged - tripped)),
            clear=max(0, int(state.clear_point[index]) + 1 - before - row.scanned),
            holdback_tokens=policy.holdback_tokens,
            content=self.content.get(index),
        )
        held = before + row.scanned + cut.kept
        snapshot = detector.snapshot(index, held) if cut.kept else None
        self.trips[index] = Trip(cut, snapshot, error)
        if error is not None:
            self.errors[index] = error
        self._mark(index, state.finite)

    def rearrange(self, moved: Rearrangement, begun: Sequence[int], like: Tensor) -> None:
        """Carry everything over to the new places of the rows.

        Args:
            moved: The places.
            begun: Scores of new rows, in their places; of others it is not read.
            like: [batch] bool, where rows live.
        """
        before = self._before
        self._before = [begun[i] if s is None else before[s] for i, s in enumerate(moved.sources)]
        self.trips, self.errors = moved.kept(self.trips), moved.kept(self.errors)
        self.content, self.parked = moved.kept(self.content), None
        for index in self.trips:
            self._mark(index, like)

    def _mark(self, index: int, like: Tensor) -> None:
        if self.parked is None:
            self.parked = torch.zeros_like(like)
        self.parked[index] = True
