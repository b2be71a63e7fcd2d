"""Random choices that belong to a row, whatever the batch it runs in.

Knows seeds, probabilities and one uniform number a step and row. Does not know models. The
global random generator is neither read nor moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RowDraws", "continued_seed"]

_BLOCK = 128
"""Steps drawn ahead at once, so that no step does anything row by row."""


class RowDraws:
    """Draws tokens, each row from a generator of its own.

    The n-th token of a row is a function of its seed, n and its probabilities alone.

    Args:
        seeds: One a row.
        device: Where the scores are.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        self._device, self._step = device, 0
        self._uniform = torch.empty(0, 0)

    def forced(self, scores: Tensor) -> Tensor:
        """Draw one token a row and force it.

        Args:
            scores: [batch, vocab] float, finite in at least one place in each row; not
                changed.

        Returns:
            A new tensor [batch, vocab]: 0 at the drawn id, -inf elsewhere.
        """
        at = self._step % _BLOCK
        if at == 0:
            blocks = [
                torch.rand(_BLOCK, 1, generator=g, dtype=torch.float64) for g in self._generators
            ]
            # Apple's devices have no float64.
            wide = torch.float32 if self._device.type == "mps" else torch.float64
            self._uniform = torch.cat(blocks, 1).to(self._device, wide)
        self._step += 1
        # In float64, so that the last ids of a large vocabulary keep their mass.
        mass = torch.softmax(scores.to(self._uniform.dtype), -1).cumsum(-1)
        mark = self._uniform[at][:, None] * mass[:, -1:]
        token = torch.searchsorted(mass, mark, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def continued_seed(seed: int | None, row: int, attempt: int) -> int:
    """Return the seed of a continuation.

    Args:
        seed: Of the row, or None: from the global generator's seed and the row's index. That
            generator is read and not moved.
        row: Index of the row in the batch.
        attempt: Continuation, from 0.
    """
    base = (torch.initial_seed(), row) if seed is None else (seed,)
    return hash((*base, attempt)) % 2**63
