"""What a session keeps of each row for those who come after it.

Knows numbers on the host. Does not know tensors on devices, models or text.
"""

from __future__ import annotations

from dataclasses import dataclass

from safe_decode.decision import Redirect
from safe_decode.errors import GuardError
from safe_decode.monitor.monitor import MonitorState
from safe_decode.policy.policy import Policy
from safe_decode.policy.redirect import Cut
from safe_decode.policy.self_check import Look

__all__ = ["Redirected", "RowRecord", "SessionRow", "Trip", "Try"]


@dataclass(frozen=True)
class SessionRow:
    """A row as it joins a session.

    Attributes:
        threshold: What its statistic is compared with.
        policy: What a trip leads to.
        scanned: Trailing positions of its prompt that are judged, at least 1.
        state: The monitor's state to go on from, [1] each; None: the row starts anew.
    """

    threshold: float
    policy: Policy
    scanned: int = 1
    state: MonitorState | None = None


@dataclass(frozen=True)
class Trip:
    """A row's one and irrevocable trip.

    Attributes:
        cut: Where the row is cut.
        snapshot: The monitor's state at the cut, [1] each; None where no generated token is
            kept, so that the row starts anew.
        error: What failed, or None for an alarm.
    """

    cut: Cut
    snapshot: MonitorState | None
    error: GuardError | None


@dataclass(frozen=True)
class RowRecord:
    """What a session knows of one row, on the host.

    Attributes:
        scanned: Leading scores that judged the prompt: s_0 and the supplied prefill.
        logits: [n][K], one entry a score.
        smoothed: [n] the statistic before the running maximum.
        statistic: [n] its running maximum.
        threshold: What the statistic was compared with.
        alarm: Index of the first score whose statistic exceeded the threshold, or None.
        trip: The trip, or None; in flag mode always None.
        error: What failed for this row, tripped or allowed to go on; or None.
        looks: Self-checks of its alarms.
        inside: [n] whether each score lies in a marked span; empty where none are followed.
        ahead: Trailing scores that judged tokens decoded unseen behind the response's end.
    """

    scanned: int
    logits: list[list[float]]
    smoothed: list[float]
    statistic: list[float]
    threshold: float
    alarm: int | None
    trip: Trip | None
    error: GuardError | None
    looks: tuple[Look, ...] = ()
    inside: tuple[bool, ...] = ()
    ahead: int = 0

    @property
    def trip_score(self) -> int | None:
        """Index of the score at which the row tripped, or would have; None if it did not."""
        last = max(0, len(self.statistic) - 1)
        if self.trip is not None and (self.looks or self.trip.error is not None):
            return last  # a tripped row is judged no more
        return None if self.looks else self.alarm

    @property
    def judged(self) -> int:
        """Count the generated tokens of the response that have a score."""
        return len(self.statistic) - self.scanned - self.ahead


@dataclass(frozen=True)
class Try:
    """One continuation of a rewound row.

    Attributes:
        record: What its session saw; its first scores judge the opener.
        opener: Ids of the opener.
        ids: Ids the model then said, EOS included.
        start: Generated ids that stood before the opener.
        kept: How many of `ids` stand.
        withheld: Tokens behind `ids` that do not stand, since too few follow them.
        behind: All ids that were judged behind `ids`: those, and unseen ones.
    """

    record: RowRecord
    opener: tuple[int, ...]
    ids: tuple[int, ...]
    kept: int
    start: int
    withheld: int = 0
    behind: tuple[int, ...] = ()


@dataclass(frozen=True)
class Redirected:
    """What a tripped row says in the end.

    Attributes:
        ids: Generated ids, EOS included where the row ends by one.
        how: The redirect that took effect: a rewind without room, with a failed guard or
            with all its tries tripped ends as refuse.
        tries: Continuations, in order.
        drops_prefill: Whether the supplied prefill was left out of the model's context.
    """

    ids: tuple[int, ...]
    how: Redirect
    tries: tuple[Try, ...] = ()
    drops_prefill: bool = False
