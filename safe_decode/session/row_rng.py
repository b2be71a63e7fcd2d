"""Random choices that belong to a row, whatever the batch it runs in, and those that do not.

Knows seeds, probabilities and one uniform number a step and row, and where the global generator
of a device stands. Does not know models. `RowRNG` neither reads nor moves that generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from safe_decode.host_copies import sent

__all__ = ["GlobalDraws", "RowRNG", "continued_seed"]

_BLOCK = 128
"""Steps drawn ahead at once, so that no step does anything row by row."""


class RowRNG:
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
            self._uniform = sent(torch.cat(blocks, 1).to(wide), self._device)
        self._step += 1
        # In float64, so that the last ids of a large vocabulary keep their mass.
        mass = torch.softmax(scores.to(self._uniform.dtype), -1).cumsum(-1)
        mark = self._uniform[at][:, None] * mass[:, -1:]
        token = torch.searchsorted(mass, mark, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class GlobalDraws:
    """Saves and restores a device's global generator, so that unseen tokens do not change it.

    Args:
        device: Whose generator draws.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state: Tensor | None = None

    def mark(self) -> None:
        """Remember where it stands."""
        self._state = (
            torch.get_rng_state() if self._is_cpu else self._module.get_rng_state(*self._which)
        )

    def restore(self) -> None:
        """Take it back to the mark, if there is one."""
        if self._state is None:
            return
        if self._is_cpu:
            torch.set_rng_state(self._state)
        else:
            self._module.set_rng_state(self._state, *self._which)
        self._state = None

    @property
    def _is_cpu(self) -> bool:
        return self._device.type == "cpu"

    @property
    def _which(self) -> tuple[torch.device, ...]:
        return (self._device,) if self._device.type == "cuda" else ()

    @property
    def _module(self) -> ModuleType:
        module: ModuleType = torch.get_device_module(self._device)
        return module


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
