"""What waits of one response on its way through the proxy, counted in token ids.

Knows pieces and their numbers of ids. Does not know what a piece is, nor marks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

__all__ = ["Hold"]

T = TypeVar("T")


class Hold(Generic[T]):
    """Pieces that wait until enough ids came after them.

    Args:
        holdback_tokens: Ids that must come after a piece.

    Attributes:
        shown_tokens: Ids of the pieces that were let go.
    """

    def __init__(self, holdback_tokens: int) -> None:
        self.shown_tokens = 0
        self._k = holdback_tokens
        self._waiting: deque[tuple[int, T]] = deque()
        self._tokens = 0

    def push(self, n_ids: int, piece: T) -> Iterator[T]:
        """Take a piece; yield what has waited long enough."""
        self._waiting.append((n_ids, piece))
        self._tokens += n_ids
        while self._waiting and self._tokens - self._waiting[0][0] >= self._k:
            yield self._pop()

    def rest(self) -> Iterator[T]:
        """Yield all that waits: the response has ended, and its end is marked."""
        while self._waiting:
            yield self._pop()

    def clear(self) -> None:
        """Drop what waits: it is never shown."""
        self._waiting.clear()
        self._tokens = 0

    def _pop(self) -> T:
        n_ids, piece = self._waiting.popleft()
        self._tokens -= n_ids
        self.shown_tokens += n_ids
        return piece
