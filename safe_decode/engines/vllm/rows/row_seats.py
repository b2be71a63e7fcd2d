"""Seats of requests: where the guard keeps what it knows of each, across preemption.

A worker is not told whether a request that leaves has ended or was preempted. So a request that
leaves keeps its seat until the seat is needed, the longest gone first; one that comes back goes on
where it was. Knows keys and seats. Does not know what is kept there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from safe_decode.errors import GuardError

__all__ = ["RowSeats", "Seat"]


class Seat(NamedTuple):
    """Where a request sits.

    Attributes:
        number: Of the seat.
        is_new: Whether nothing is known of the request.
    """

    number: int
    is_new: bool


class RowSeats:
    """The seats of one worker.

    Args:
        n_seats: More than requests that run at the same time.
    """

    def __init__(self, n_seats: int) -> None:
        self._free = list(range(n_seats - 1, -1, -1))
        self._running: dict[Hashable, int] = {}
        self._gone: OrderedDict[Hashable, int] = OrderedDict()

    def take(self, key: Hashable) -> Seat:
        """Seat a request that joins.

        Args:
            key: Which no other request has while this one is known.

        Raises:
            GuardError: More requests run than there are seats.
        """
        if key in self._running:
            return Seat(self._running[key], is_new=False)
        if key in self._gone:
            self._running[key] = self._gone.pop(key)
            return Seat(self._running[key], is_new=False)
        if not self._free and not self._gone:
            raise GuardError(
                f"{len(self._running)} requests run and the guard has no more seats, wanted at "
                "most max_num_seqs of them; report this with the engine's configuration."
            )
        index = self._free.pop() if self._free else self._gone.popitem(last=False)[1]
        self._running[key] = index
        return Seat(index, is_new=True)

    def leave(self, key: Hashable) -> None:
        """Let a request leave; it may come back while its seat is not needed."""
        index = self._running.pop(key, None)
        if index is not None:
            self._gone[key] = index
