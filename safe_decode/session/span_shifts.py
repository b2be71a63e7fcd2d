"""By how much the values of rows are lowered, since they stand in marked reasoning.

Knows spans and columns of a batch. Does not know scores.
"""

from __future__ import annotations

from torch import Tensor

from safe_decode.policy.reasoning import SpanReader

__all__ = ["SpanShifts"]


class SpanShifts:
    """Follows the spans of one session.

    Args:
        spans: Follows marked reasoning; None: there is none, and nothing is lowered.
    """

    def __init__(self, spans: SpanReader | None) -> None:
        self._spans, self._columns = spans, 0
        self._shift: Tensor | None = None

    @property
    def are_followed(self) -> bool:
        """Say whether there are spans."""
        return self._spans is not None

    def note(self, ids: Tensor, *, scanned: int, new_tokens: int) -> None:
        """Take note of the ids that the next forward to be judged has read.

        Args:
            ids: [batch, seq] everything so far, padding included.
            scanned: Positions of the prompt that the forward is judged at; 0: it reads one token.
            new_tokens: Of whole responses, columns of answers.
        """
        if self._spans is None:
            return
        n_columns = 1
        if scanned:
            n_columns, self._columns = scanned + new_tokens, ids.shape[1] - new_tokens
        self._shift = self._spans.shift(ids, n_columns)

    def at(self, position: int) -> Tensor | None:
        """Return by how much values are lowered at one position of the forward, [batch]."""
        return None if self._shift is None else self._shift[:, position]

    def closing(self, row: int) -> tuple[int, ...]:
        """Return the ids that close the span in which a row stands; empty outside of one."""
        return () if self._spans is None else self._spans.closing(row)

    def inside(self, row: int, scanned: int, n_scores: int) -> tuple[bool, ...]:
        """Say of each score of a row whether it lies in a span; empty where none are followed."""
        if self._spans is None:
            return ()
        first = self._columns - scanned
        return tuple(self._spans.inside(row, first + index) for index in range(n_scores))
