"""Scores kept where the engine keeps a position's keys and values: by slot of its cache.

What is cached, chunked, preempted or resumed brings its scores along, since they stand beside
the keys and values that brought them about. Beside each score stands a mark: for which token, at
which position, and in which forward it was written. Whoever reads says what the mark should be.

Knows slots and marks. Does not know requests, probes or what a score leads to.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ScoreSlots"]


class ScoreSlots:
    """The scores of one engine.

    Args:
        n_slots: Of the cache: its blocks times their size.
        n_heads: K.
        device: Of the cache.

    Attributes:
        forward: [1] int64, the number of the present forward.
    """

    def __init__(self, n_slots: int, n_heads: int, device: torch.device) -> None:
        # One more for padding, which is written and never read.
        self._scores = torch.full((n_slots + 1, n_heads), torch.nan, device=device)
        # [token, position, forward]
        self._marks = torch.full((n_slots + 1, 3), -1, dtype=torch.int64, device=device)
        self.forward = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def n_slots(self) -> int:
        """Count the slots that can be read."""
        return len(self._scores) - 1

    def write(self, slots: Tensor, scores: Tensor, tokens: Tensor, positions: Tensor) -> None:
        """Write the scores of a forward in place; no host is waited for.

        Args:
            slots: [n] int64; negative ones are padding.
            scores: [n, K] float32.
            tokens: [n] integers, ids that were read.
            positions: [n] integers, where they stand in their sequences.
        """
        slots = torch.where(slots < 0, self.n_slots, slots).long()
        self._scores.index_copy_(0, slots, scores)
        marks = torch.stack(
            [tokens.long(), positions.long(), self.forward.expand(len(slots))], dim=1
        )
        self._marks.index_copy_(0, slots, marks)

    def read(
        self, slots: Tensor, tokens: Tensor, positions: Tensor, is_fresh: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read scores and say whose marks are right.

        Args:
            slots: [rows, n] int64.
            tokens: [rows, n] ids that should have been read there.
            positions: [rows, n] where they should stand.
            is_fresh: [rows, n] bool, written in the present forward; others are from the cache.

        Returns:
            Scores [rows, n, K] and [rows, n] bool, whether each belongs to its position.
        """
        slots = slots.clamp(0, self.n_slots)
        marks = self._marks[slots]
        belongs = (marks[..., 0] == tokens) & (marks[..., 1] == positions)
        in_time = (marks[..., 2] == self.forward) | ~is_fresh
        return self._scores[slots], belongs & in_time & (slots < self.n_slots)
