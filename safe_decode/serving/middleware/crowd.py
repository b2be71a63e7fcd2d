"""Which connections are open, and who makes room for whom.

Knows limits, addresses and who keeps the server waiting. Does not know sockets or HTTP.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from safe_decode.serving.operations.metrics import Metrics
from safe_decode.serving.settings import ServeSettings

if TYPE_CHECKING:
    from safe_decode.serving.middleware.connections import BoundedProtocol

__all__ = ["BURST", "BURST_SECONDS", "Crowd", "Dropped"]

Dropped = Literal["slow_headers", "slow_reader", "crowded_out", "refused"]
"""slow_headers: did not send them in time. slow_reader: took nothing for too long. crowded_out:
kept the server waiting while others came. refused: came when nobody's place could be taken."""

BURST = 256
"""So many connections may exceed a limit for a moment; they may have come with their request."""
BURST_SECONDS = 0.1
"""The moment: many turns of the event loop, few of a human."""


class Crowd:
    """The open connections of one server, within their limits.

    A burst is let in beyond a limit and the oldest ones end a moment later, so that a request
    which has already arrived is read before its connection is judged.

    Args:
        settings: The limits.
        metrics: Counts.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self.settings, self._metrics = settings, metrics
        # In the order of their coming.
        self._all: dict[BoundedProtocol, None] = {}
        self._of: dict[str, dict[BoundedProtocol, None]] = defaultdict(dict)
        self._shrinking: asyncio.TimerHandle | None = None

    def enter(self, connection: BoundedProtocol) -> bool:
        """Let a connection in, in the place of one that keeps us waiting where it is full.

        Returns:
            Whether there is a place for it.
        """
        own = self._of[connection.address]
        for limit, among in ((self._own_limit, own), (self._limit, self._all)):
            if len(among) >= limit and not self._may_exceed(limit, among):
                self.count("refused")
                if not own:
                    del self._of[connection.address]
                return False
        self._of[connection.address] = own
        self._all[connection] = own[connection] = None
        self._metrics.connections.set(len(self._all))
        return True

    def leave(self, connection: BoundedProtocol) -> None:
        """Forget a connection; nothing if it never entered or has left."""
        if connection not in self._all:
            return
        del self._all[connection]
        own = self._of[connection.address]
        del own[connection]
        if not own:
            del self._of[connection.address]
        self._metrics.connections.set(len(self._all))

    def count(self, why: Dropped) -> None:
        """Count a connection that the server ended."""
        self._metrics.dropped_connections.labels(why).inc()

    @property
    def _limit(self) -> int:
        return self.settings.max_connections

    @property
    def _own_limit(self) -> int:
        return self.settings.max_connections_per_address

    def _may_exceed(self, limit: int, among: Collection[BoundedProtocol]) -> bool:
        if len(among) >= limit + BURST:
            return self._end_oldest(among)
        if not any(one.keeps_us_waiting for one in among):
            return False
        if self._shrinking is None:
            loop = asyncio.get_running_loop()
            self._shrinking = loop.call_later(BURST_SECONDS, self._shrink)
        return True

    def _shrink(self) -> None:
        """End the oldest of those that keep us waiting until the limits hold again."""
        self._shrinking = None
        limits = [(self._own_limit, own) for own in list(self._of.values())]
        for limit, among in (*limits, (self._limit, self._all)):
            while len(among) > limit and self._end_oldest(among):
                pass

    def _end_oldest(self, among: Collection[BoundedProtocol]) -> bool:
        """End who came first of those without a whole request, and never had one if there is one.

        Returns:
            Whether there was one.
        """
        waiting = [one for one in among if one.keeps_us_waiting]
        if not waiting:
            return False
        # `min` takes the first of equals.
        victim = min(waiting, key=lambda one: one.cycle is not None)
        self.leave(victim)
        victim.drop("crowded_out")
        return True
