"""A frozen perceptron with one hidden layer: features to logits.

Knows its weights, the names of its heads and the sites they belong to. Does not know how it was
fitted, what a logit means over time, or where features come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from safe_decode.activations.site import Site
from safe_decode.probe.checks import require_features, require_parts
from safe_decode.probe.folding import fold_standardisation
from safe_decode.probe.interface import Probe
from safe_decode.probe.registry import layout_of

__all__ = ["MLPProbe"]


@dataclass(frozen=True, eq=False)
class MLPProbe(Probe):
    """One hidden layer of rectified linear units for all heads.

    logits = activation(features @ hidden_weight + hidden_bias) @ output_weight + output_bias.

    The activation is ReLU for finite values and NaN for all others: ReLU alone would turn minus
    infinity into 0, and a row whose activations are not finite would look judged.

    Attributes:
        sites: In the order of `sorted_sites`; features are concatenated in this order.
        hidden_weight: [F, H] float32, with the standardisation of the features folded in.
        hidden_bias: [H] float32, with the standardisation folded in too.
        output_weight: [H, K] float32.
        output_bias: [K] float32.
        heads: K distinct names.

    Raises:
        ConfigurationError: Shapes, dtypes, devices or names do not fit together, the
            sites are out of order, or a weight is NaN or infinite.
    """

    kind: ClassVar[str] = "mlp"
    sites: tuple[Site, ...]
    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    heads: tuple[str, ...]
    # [H, F] and [K, H] contiguous, the layout that torch's linear reads fastest.
    _hidden: Tensor = field(init=False, repr=False)
    _output: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        require_parts(layout_of(self.kind), self.sites, self.tensors(), self.heads)
        object.__setattr__(self, "_hidden", self.hidden_weight.detach().t().contiguous())
        object.__setattr__(self, "_output", self.output_weight.detach().t().contiguous())

    def __call__(self, features: Tensor) -> Tensor:
        """Map features to logits.

        Args:
            features: [..., F], any floating dtype, on the probe's device.

        Returns:
            [..., K] float32; NaN where a feature is NaN or infinite.

        Raises:
            ConfigurationError: F or the device is another than the probe's.
        """
        require_features(features, self._hidden.shape[1], self._hidden.device)
        hidden = functional.linear(features.float(), self._hidden, self.hidden_bias)
        # h - h is 0 where h is finite, and NaN otherwise.
        activated = torch.relu(hidden) + (hidden - hidden)
        return functional.linear(activated, self._output, self.output_bias)

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and biases of both layers."""
        return {name: getattr(self, name) for name in layout_of(self.kind).shapes}

    @classmethod
    def from_tensors(
        cls, sites: tuple[Site, ...], tensors: Mapping[str, Tensor], heads: tuple[str, ...]
    ) -> Self:
        """Build a probe from weights and biases by name. Raises as the class."""
        return cls(sites=tuple(sites), heads=tuple(heads), **tensors)

    @classmethod
    def folded(
        cls,
        sites: Sequence[Site],
        tensors: Mapping[str, Tensor],
        mean: Tensor,
        std: Tensor,
        heads: Sequence[str],
    ) -> Self:
        """Fold standardisation into the hidden layer; see `fold_standardisation`.

        Args:
            sites: In the order of `sorted_sites`.
            tensors: As `tensors` returns them, for standardised features.
            mean: [F] of the raw features.
            std: [F] of the raw features, every one above 0.
            heads: K names.

        Raises:
            ConfigurationError: As `fold_standardisation`, or as the class.
        """
        hidden = fold_standardisation(tensors["hidden_weight"], tensors["hidden_bias"], mean, std)
        folded = {**tensors, "hidden_weight": hidden.weight, "hidden_bias": hidden.bias}
        return cls.from_tensors(tuple(sites), folded, tuple(heads))
