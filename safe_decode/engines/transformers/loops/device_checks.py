"""What is asked of a device as cheaply as it allows: whether scores are finite, and a late flag.

A flag of an accelerator is read a step later without waiting for it: the copy is queued behind
the work that makes it; by the time it is read the generation loop has waited for later work of
its own. Should it not have, reading waits: never is an older flag taken for this one. Knows
tensors of scores and one flag. Does not know rows that count, or what becomes of one that is
broken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["AsyncFlag", "all_finite", "broken", "picked", "top"]


def top(scores: Tensor) -> Tensor:
    """Take each row's largest score, [batch]: NaN and +Inf show in it, and a row without any."""
    return scores.amax(-1)


def picked(scores: Tensor, input_ids: Tensor) -> Tensor:
    """Take the scores [batch] of the ids chosen last, the last column of `input_ids` [batch, seq].

    Greedy picks NaN or Inf where there is any: the picked score tells of the row.
    """
    return scores.gather(1, input_ids[:, -1:]).view(-1)


def broken(values: Tensor) -> Tensor:
    """Say which of `values` [batch] are NaN or Inf, without waiting."""
    return values - values != 0


def all_finite(values: Tensor) -> bool:
    """Say, on the CPU, whether all of a few values are finite.

    A sum is finite if its terms are, but for sums that overflow: whoever asks then looks closer.
    """
    return math.isfinite(sum(values.tolist()))


class AsyncFlag:
    """Holds the newest flag on its way to the host.

    Args:
        device: Where flags are made; on the CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._flag = torch.zeros((), dtype=torch.bool, pin_memory=self._is_cuda)
        self._arrived = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]

    def send(self, flags: Tensor) -> None:
        """Queue whether any of `flags` [batch] bool is set."""
        self._flag.copy_(flags.any(), non_blocking=self._is_cuda)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> bool:
        """Return what was sent last."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
