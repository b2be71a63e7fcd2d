"""A yes or no of an accelerator, read a step later without waiting for it.

Knows one flag and how it comes to the host. Does not know what it means. The copy is queued
behind the work that makes it; by the time it is read the generation loop has waited for later
work of its own. Should it not have, reading waits: never is an older flag taken for this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AsyncFlag"]


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
