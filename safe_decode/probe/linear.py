"""A frozen linear probe: features to logits.

Knows weights, biases, the names of its heads and the sites they belong to. Does not
know how it was fitted, what a logit means over time, or where features come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

from torch import Tensor
from torch.nn import functional

from safe_decode.activations.site import Site
from safe_decode.probe.checks import require_features, require_parts
from safe_decode.probe.folding import fold_standardisation
from safe_decode.probe.interface import Probe
from safe_decode.probe.registry import layout_of

__all__ = ["LinearProbe"]


@dataclass(frozen=True, eq=False)
class LinearProbe(Probe):
    """One linear map for all heads.

    Attributes:
        sites: In the order of `sorted_sites`; features are concatenated in this order.
        weight: [F, K] float32.
        bias: [K] float32.
        heads: K distinct names.

    Raises:
        ConfigurationError: Shapes, dtypes, devices or names do not fit together, the
            sites are out of order, or a weight is NaN or infinite.
    """

    kind: ClassVar[str] = "linear"
    sites: tuple[Site, ...]
    weight: Tensor
    bias: Tensor
    heads: tuple[str, ...]
    # [K, F] contiguous, the layout that torch's linear reads fastest.
    _transposed: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        require_parts(layout_of(self.kind), self.sites, self.tensors(), self.heads)
        object.__setattr__(self, "_transposed", self.weight.detach().t().contiguous())

    def __call__(self, features: Tensor) -> Tensor:
        """Map features to logits.

        Args:
            features: [..., F], any floating dtype, on the probe's device.

        Returns:
            [..., K] float32. NaN and infinities in the features come out as such.

        Raises:
            ConfigurationError: F or the device is another than the probe's.
        """
        require_features(features, self._transposed.shape[1], self._transposed.device)
        return functional.linear(features.float(), self._transposed, self.bias)

    def tensors(self) -> dict[str, Tensor]:
        """Return weight and bias."""
        return {"weight": self.weight, "bias": self.bias}

    @classmethod
    def from_tensors(
        cls, sites: tuple[Site, ...], tensors: Mapping[str, Tensor], heads: tuple[str, ...]
    ) -> Self:
        """Build a probe from weight and bias. Raises as the class."""
        return cls(sites, tensors["weight"], tensors["bias"], tuple(heads))

    @classmethod
    def folded(
        cls,
        sites: Sequence[Site],
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        std: Tensor,
        heads: Sequence[str],
    ) -> Self:
        """Fold standardisation into the weights; see `fold_standardisation`.

        Args:
            sites: In the order of `sorted_sites`.
            weight: [F, K] for standardised features.
            bias: [K].
            mean: [F] of the raw features.
            std: [F] of the raw features, every one above 0.
            heads: K names.

        Raises:
            ConfigurationError: As `fold_standardisation`, or as the class.
        """
        folded = fold_standardisation(weight, bias, mean, std)
        return cls(tuple(sites), folded.weight, folded.bias, tuple(heads))
