"""What rows that alarm say first, forced on a device before the host has heard of them.

Knows rows, scores and one id. Does not know sessions or what a row says afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from safe_decode.host_copies import LateCopies

__all__ = ["Alarms", "LateForcing"]


class Alarms(NamedTuple):
    """The rows that alarm at one score.

    Attributes:
        suspects: [batch] bool, rows that alarm or whose scores are broken.
        trips: [batch] bool, those that alarm, now or before.
        said: Tokens chosen before it.
    """

    suspects: Tensor
    trips: Tensor
    said: int

    def but(self, known: Tensor) -> Alarms:
        """Leave out rows [batch] bool that the host has heard of."""
        return self._replace(suspects=self.suspects & ~known)


class LateForcing:
    """For one call on a device.

    Args:
        device: Where the rows are.

    Attributes:
        unheard: Alarms on their way to the host, there; None: there are none.
    """

    def __init__(self, device: torch.device) -> None:
        self.unheard: Alarms | None = None
        self._copies = LateCopies(device)
        self._forced: dict[int, Tensor] = {}

    def force(self, scores: Tensor, alarms: Alarms, first: int) -> Tensor:
        """Let rows that alarm say an id, and send word of them to the host.

        Args:
            scores: [batch, vocab], not changed; what it holds in these rows is not read.
            alarms: There.
            first: The id.

        Returns:
            A new tensor [batch, vocab]; other rows are copied bit for bit.
        """
        if first not in self._forced:
            self._forced[first] = torch.full_like(scores[0], -torch.inf)
            self._forced[first][first] = 0.0
        self._copies.send({"suspects": alarms.suspects, "trips": alarms.trips})
        self.unheard = alarms
        return torch.where(alarms.suspects[:, None], self._forced[first], scores)

    def heard(self) -> Alarms | None:
        """Return, once, the alarms that were sent last, on the host; None: there are none."""
        if self.unheard is None:
            return None
        alarms, self.unheard = self.unheard, None
        here = self._copies.read()
        return Alarms(here["suspects"], here["trips"], alarms.said)
