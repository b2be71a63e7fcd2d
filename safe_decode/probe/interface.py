"""What the runtime asks of a probe, whatever its kind.

Knows features [batch, F] and logits [batch, K]. Does not know how a kind computes or is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from safe_decode.activations.site import Site

__all__ = ["Probe"]


class Probe(Protocol):
    """A frozen map from features to logits. A class of a kind inherits from this Protocol.

    A probe computes in float32 on one device, changes nothing and remembers nothing: the logits
    of a row follow from its features alone. Features that are not finite yield logits that are
    not finite, so that no kind may hide them; the session closes such rows.

    Attributes:
        kind: Name of the kind in `safe_decode.probe.registry`.
        sites: In the order of `sorted_sites`; features are concatenated in this order.
        heads: K distinct names.
    """

    kind: ClassVar[str]
    sites: tuple[Site, ...]
    heads: tuple[str, ...]

    def __call__(self, features: Tensor) -> Tensor:
        """Map features to logits.

        Args:
            features: [..., F], any floating dtype, on the probe's device.

        Returns:
            [..., K] float32. Gradients flow to the features.

        Raises:
            ConfigurationError: F or the device is another than the probe's.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, named and shaped as the kind's layout says."""
        ...

    @classmethod
    def from_tensors(
        cls, sites: tuple[Site, ...], tensors: Mapping[str, Tensor], heads: tuple[str, ...]
    ) -> Self:
        """Build a probe from what `tensors` returned.

        Raises:
            ConfigurationError: Shapes, dtypes, devices or names do not fit together, the sites
                are out of order, or a value is NaN or infinite.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return this probe with its tensors on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return self.from_tensors(self.sites, moved, self.heads)
