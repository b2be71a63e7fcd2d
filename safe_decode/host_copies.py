"""Numbers on their way between the host and a device, so that neither waits for the other.

Knows tensors, pinned memory and events. Does not know what the numbers mean.

A copy to a device that does not say `non_blocking` waits for the device, however small it is; one
that says it may leave at once, since what is not pinned is staged before the call returns. A copy
to the host is another matter: what it holds means nothing until its event has passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["LateCopies", "sent"]


def sent(
    values: Tensor | Sequence[object] | float,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Send numbers of the host to a device without waiting for it.

    Args:
        values: A tensor, or what `torch.tensor` takes.
        device: Where they are wanted.
        dtype: None: as `torch.tensor` has it.
    """
    made = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    # What comes from a device is waited for: the host would read it too early.
    return made.to(device, non_blocking=made.is_cpu)


class LateCopies:
    """Copies of a device's tensors on their way to the host; the newest ones are read.

    On a CUDA device they go into pinned memory and an event tells when they have arrived. A loop
    that has waited for later work meanwhile reads them without a wait. Should it not have, reading
    waits: an older copy is never taken for a newer one. Other devices are waited for.

    Args:
        device: Where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._places: dict[str, Tensor] = {}
        self._sent: tuple[str, ...] = ()
        self._arrived = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Queue the copies, by name; shape and dtype of a name never change."""
        for name, tensor in tensors.items():
            place = self._places.get(name)
            if place is None:
                place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._is_cuda)
                self._places[name] = place
            place.copy_(tensor, non_blocking=self._is_cuda)
        self._sent = tuple(tensors)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> dict[str, Tensor]:
        """Return what was sent last, by name; good until the next `send`."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return {name: self._places[name] for name in self._sent}
