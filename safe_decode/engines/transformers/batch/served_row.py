"""One row of a server's batch: its release, and its last event.

Knows a row's request and the one release room. Does not know models, scores or batches.
"""

from __future__ import annotations

from safe_decode.decision import Outcome
from safe_decode.engines.rows import Row
from safe_decode.session.session import Trip
from safe_decode.streaming.events import Finished, FinishReason
from safe_decode.streaming.release import ReleaseRules, RowRelease
from safe_decode.typing import Tokenizer

__all__ = ["ServedRow"]


class ServedRow:
    """Follows one row and tells its reader what may be shown.

    Args:
        row: Whose events these are.
        tokenizer: Decodes.
        void: Why the certificate does not speak of it, or None.

    Attributes:
        release: Of the row. After a trip it belongs to what follows the trip, in a thread of its
            own, and the batch leaves it alone.
        has_left: Whether its reader left before it had ended.
    """

    def __init__(self, row: Row, tokenizer: Tokenizer, *, void: str | None) -> None:
        self.row, self.void = row, void
        self.has_left = False
        self._said_ids: tuple[int, ...] | None = None
        policy = row.request.policy
        self.release = RowRelease(
            0,
            tokenizer,
            holdback_tokens=policy.holdback_tokens,
            redirect=policy.redirect,
            rules=ReleaseRules(row.request.sampling.stop, includes_stop=False, tells_notes=True),
            emit=row.emit,
            is_cancelled=lambda: row.is_cancelled,
        )

    @property
    def is_over(self) -> bool:
        """Say whether the row's own run has ended, by a trip too."""
        return self._said_ids is not None or self.release.is_over

    @property
    def goes_on(self) -> bool:
        """Say whether the next chosen id belongs to its response."""
        return not self.is_over and not self.release.is_cut

    @property
    def said_ids(self) -> tuple[int, ...]:
        """Ids that were chosen in the row's own run."""
        return self.release.said_ids if self._said_ids is None else self._said_ids

    def trip(self, trip: Trip, statistic: float | None) -> int:
        """End the row's own run by a trip; return how many tokens will not be shown."""
        self._said_ids = self.release.said_ids
        return self.release.trip(trip, statistic)

    def leave(self) -> None:
        """End the row: its reader has left."""
        self.has_left = True
        self.release.leave()
        self._finish("cancelled", None)

    def finish(self, *, is_flagged: bool) -> None:
        """Emit the last event of a row that has ended and was not redirected.

        Args:
            is_flagged: It crossed the threshold, and its redirect changes nothing.
        """
        self.release.complete()
        self._finish(self.release.reason, "flagged" if is_flagged else "released")

    def _finish(self, reason: FinishReason, outcome: Outcome | None) -> None:
        self.row.emit(
            Finished(
                reason,
                outcome=outcome,
                shown_tokens=self.release.shown_tokens,
                void=self.void,
                stop=self.release.stop_string,
            )
        )
