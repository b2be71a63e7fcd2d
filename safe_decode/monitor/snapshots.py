"""The last states of a batch, to go back to.

Knows states and steps. Does not know how a state comes about.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from safe_decode.errors import ConfigurationError
from safe_decode.monitor.monitor import MonitorState

__all__ = ["SnapshotRing"]


class SnapshotRing:
    """The last states of a batch, enough to rewind over a hold-back.

    A state is immutable, so a snapshot is a reference: pushing costs no copy and the
    ring holds `size` states however long the response is.

    Args:
        size: Snapshots kept: hold-back + 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigurationError(f"size={size} keeps no snapshot; pass hold-back + 1.")
        self._states: deque[MonitorState] = deque(maxlen=size)

    def push(self, state: MonitorState) -> None:
        """Remember a state; the oldest goes."""
        self._states.append(state)

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[MonitorState]:
        """Go over the states that are held, the oldest first."""
        return iter(self._states)

    def row_at(self, row: int, step: int) -> MonitorState | None:
        """Find a row's state after `step` scores, [1] each; None if it is no longer held."""
        for state in reversed(self._states):
            if int(state.step[row]) == step:
                return state.row(row)
        return None
