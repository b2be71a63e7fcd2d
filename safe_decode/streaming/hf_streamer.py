"""Streamers of transformers, fed with what may be shown.

Knows `put` and `end`, and events. Does not know models. `TextIteratorStreamer` and its like
drop in unchanged: they get one id at a time, in order, but only once it may be shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from safe_decode.streaming.events import GuardText, Released, StreamEvent

__all__ = ["Streamer", "ended_with_call", "feeder"]


class Streamer(Protocol):
    """What `generate` asks of a streamer."""

    def put(self, value: Tensor) -> None:
        """Take the prompt's ids [1, seq] first, then each id as a tensor [1]."""
        ...

    def end(self) -> None:
        """Nothing follows."""
        ...


def feeder(streamer: Streamer) -> Callable[[StreamEvent], None]:
    """Return what takes the events of one row and feeds a streamer.

    Args:
        streamer: Already given the prompt.
    """

    def feed(event: StreamEvent) -> None:
        if isinstance(event, Released | GuardText):
            for token in event.token_ids:
                streamer.put(torch.tensor([token]))

    return feed


@contextmanager
def ended_with_call(streamer: Streamer | None) -> Iterator[None]:
    """End a streamer however the call ends: its reader, in another thread, would wait forever."""
    try:
        yield
    finally:
        end = getattr(streamer, "end", None)
        if end is not None:  # what is no streamer has been refused
            end()
