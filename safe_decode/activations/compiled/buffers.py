"""What compiled graphs leave of each site, and how often they ran.

Knows one register a site, a counter that the graph itself moves, and who reads them. Does not
know models, modules or sessions. A compiled graph runs no Python of ours: while it is traced,
`ActivationBuffer.leave` becomes part of it, and what it stores is there when the graph returns. So
a register holds the newest forward alone, and only the counter tells of one that nobody took. One
session at a time reads them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from safe_decode.activations.site import Site
from safe_decode.errors import UnsupportedError

__all__ = ["ActivationBuffer", "ActivationBuffers"]


class ActivationBuffer:
    """Holds one site's activation of the newest compiled forward.

    Args:
        site: Whose.
        device: Where its module computes.
        count: 0-dim int64, moved by one in place at each forward; None: another register's does.
    """

    def __init__(self, site: Site, device: torch.device, *, count: Tensor | None) -> None:
        self.value: Tensor | None = None
        self._channels = torch.tensor(site.channels, device=device)
        self._count = count

    def leave(self, hidden: Tensor, batch: int) -> None:
        """Keep an activation; traced into the graph.

        Args:
            hidden: [batch, seq, width] or [batch * seq, width].
            batch: Rows, where `hidden` does not say.
        """
        if hidden.ndim == 2:
            hidden = hidden.view(batch, -1, hidden.shape[-1])
        self.value = hidden.index_select(2, self._channels.to(hidden.device))
        if self._count is not None:
            self._count.add_(1)


class ActivationBuffers:
    """The registers of one tap.

    Args:
        sites: In the order of `sorted_sites`.
        devices: Where each site's module computes.

    Attributes:
        by_site: One a site.
        batch: Rows of the newest compiled forward, where a site does not say.
    """

    def __init__(self, sites: Sequence[Site], devices: Sequence[torch.device]) -> None:
        import torch._dynamo  # slow to import, and only who compiles needs it

        # The deepest site counts: a forward that ended before it left no complete beat.
        self._count = torch.zeros((), dtype=torch.int64, device=devices[-1])
        # Captured graphs write to a place that does not move.
        torch._dynamo.mark_static_address(self._count)
        self.by_site = tuple(
            ActivationBuffer(site, device, count=self._count if index == len(sites) - 1 else None)
            for index, (site, device) in enumerate(zip(sites, devices, strict=True))
        )
        self.batch = 0
        self._before = self._count.clone()
        self._taken = 0
        self._in_use = threading.Lock()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read the registers, emptied first; no other session reads them meanwhile.

        Raises:
            UnsupportedError: Another session reads them.
        """
        if not self._in_use.acquire(blocking=False):
            raise UnsupportedError(
                "the model's installed taps are being read by another session; generate one call "
                "after the other, or outside decoder.installed()."
            )
        try:
            self.discard()
            yield
        finally:
            self.discard()
            self._in_use.release()

    def discard(self) -> None:
        """Forget the forwards so far. Does not wait for the device."""
        for register in self.by_site:
            register.value = None
        self._before, self._taken = self._count.clone(), 0

    def taken(self) -> list[tuple[int, Tensor]]:
        """Take what the newest forward left: index of the site, [batch, seq, channels].

        Empty where no compiled forward ran since the last time.
        """
        pieces: list[tuple[int, Tensor]] = []
        for index, register in enumerate(self.by_site):
            value = register.value
            if value is not None:
                register.value = None
                pieces.append((index, value))
        if len(pieces) == len(self.by_site):
            self._taken += 1
        return pieces

    def is_exact(self) -> Tensor:
        """Say whether every forward was taken: 0-dim bool on the counter's device, not waited."""
        return self._count - self._before == self._taken
