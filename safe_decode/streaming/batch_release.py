"""The rows of one batch on their way to their reader, as a loop tells of its choices.

Knows the rows' releases and which of them has tripped. Does not know texts or scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safe_decode.session.turns import Turns
from safe_decode.streaming.release import RowRelease, TripNotice

__all__ = ["Releaser"]


class Releaser:
    """Follows the loop of one batch.

    Args:
        rows: One each, in the order of the batch.
    """

    def __init__(self, rows: Sequence[RowRelease]) -> None:
        self.rows = tuple(rows)

    def on_choice(
        self, newest: Sequence[int], turns: Turns | None, trips: Mapping[int, TripNotice]
    ) -> None:
        """Take note of one choice in each row, see `Follower`.

        Raises:
            Cancelled: The reader wants no more.
        """
        self.rows[0].require_reader()
        for index, row in enumerate(self.rows):
            if row.is_over:
                continue
            if index in trips:
                row.trip(trips[index])
                continue
            row.judge()
            if turns is None:
                row.say(newest[index])
            else:
                row.take(newest[index], index, turns)

    def on_end(self, wanted: Sequence[int], trips: Mapping[int, TripNotice]) -> None:
        """All rows have ended and their tails were judged, see `Follower`."""
        for index, row in enumerate(self.rows):
            if row.is_over:
                continue
            if index in trips:
                row.trip(trips[index])
            else:
                row.judge()
                row.end(wanted[index])
