"""What a reader is told while a call runs, and why a row has ended.

Knows releasers, outcomes and reasons. Does not know sessions, models or how a call runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safe_decode.decoding import CallSettings
from safe_decode.events import FinishReason
from safe_decode.outcome import Outcome
from safe_decode.release import Releaser, RowRelease

__all__ = ["LateReleaser", "finish_reason"]


class LateReleaser:
    """A releaser that is made at the first choice, when the settings of the call are known.

    Args:
        make: Makes it from the loop.

    Attributes:
        loop: To be set before the first choice.
    """

    def __init__(self, make: Callable[[Any], Releaser]) -> None:
        self.loop: Any = None
        self._make = make
        self._releaser: Releaser | None = None

    def releaser(self) -> Releaser:
        """Return it, made where it was not yet."""
        if self._releaser is None:
            self._releaser = self._make(self.loop)
        return self._releaser

    def on_choice(
        self, newest: Sequence[int], done: Sequence[bool], trips: Mapping[int, Any]
    ) -> None:
        """See `Follower`."""
        self.releaser().on_choice(newest, done, trips)

    def on_end(self, trips: Mapping[int, Any]) -> None:
        """See `Follower`."""
        self.releaser().on_end(trips)


def finish_reason(outcome: Outcome, reader: RowRelease, settings: CallSettings) -> FinishReason:
    """Say why a row has ended, in the words of the field."""
    redirected = outcome.redirected
    if outcome.cancelled_after is not None:
        return "cancelled"
    if outcome.record.trip is not None and (redirected is None or redirected.how != "rewind"):
        return "content_filter"
    if reader.end_id is not None or reader.stop_string is not None:
        return "stop"
    return "length" if len(outcome.ids) >= settings.max_new_tokens else "stop"
