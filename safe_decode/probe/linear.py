"""A frozen linear probe: features to logits.

Knows weights, biases, the names of its heads and the sites they belong to. Does not
know how it was fitted, what a logit means over time, or where features come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from safe_decode.activations.site import Site, n_features, sorted_sites
from safe_decode.errors import ConfigurationError

__all__ = ["LinearProbe"]


@dataclass(frozen=True, eq=False)
class LinearProbe:
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

    sites: tuple[Site, ...]
    weight: Tensor
    bias: Tensor
    heads: tuple[str, ...]
    # [K, F] contiguous, the layout that torch's linear reads fastest.
    _transposed: Tensor = field(init=False, repr=False)
    # The same memory as [F, K]: linear takes this view anew at every call.
    _columns: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        if tuple(self.sites) != sorted_sites(self.sites):
            raise ConfigurationError("sites are out of order; pass sorted_sites(sites).")
        expected = (n_features(self.sites), len(self.heads))
        if tuple(self.weight.shape) != expected or tuple(self.bias.shape) != expected[1:]:
            raise ConfigurationError(
                f"weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)} do not fit "
                f"{expected[0]} features and {expected[1]} heads; pass weight {expected} and "
                f"bias {expected[1:]}."
            )
        if not self.heads or len(set(self.heads)) != len(self.heads):
            raise ConfigurationError(f"heads={self.heads} must be distinct names, at least one.")
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            _require_finite_float32(name, value)
        if self.weight.device != self.bias.device:
            raise ConfigurationError(
                f"weight is on {self.weight.device} and bias on {self.bias.device}; use one device."
            )
        object.__setattr__(self, "_transposed", self.weight.detach().t().contiguous())
        object.__setattr__(self, "_columns", self._transposed.t())

    def __call__(self, features: Tensor) -> Tensor:
        """Map features to logits.

        Args:
            features: [..., F], any floating dtype, on the probe's device.

        Returns:
            [..., K] float32. NaN and infinities in the features come out as such.

        Raises:
            ConfigurationError: F or the device is another than the probe's.
        """
        if features.shape[-1] != self._transposed.shape[1]:
            raise ConfigurationError(
                f"features have {features.shape[-1]} channels, the probe reads "
                f"{self._transposed.shape[1]}; tap the probe's own sites."
            )
        if features.device != self._transposed.device:
            raise _elsewhere(features, self._transposed.device)
        return functional.linear(features.float(), self._transposed, self.bias)

    def unchecked(self, features: Tensor) -> Tensor:
        """Map features as a call does, bit for bit, in the way of every token.

        Args:
            features: [batch, F] float32 on the probe's device: as a call has checked before.
        """
        return torch.addmm(self.bias, features, self._columns)

    def over_whole_activations(self, columns: Tensor, n_columns: int) -> Callable[[Tensor], Tensor]:
        """Read whole activations instead of features: zero weights elsewhere.

        Where activations are short, this costs less than selecting the features first. NaN and
        infinities in channels that are not read come out as NaN.

        Args:
            columns: [F] long, where the features stand in the whole.
            n_columns: Width of the whole.

        Returns:
            A map from [batch, n_columns] float32 on the probe's device to [batch, K]; it raises
            ConfigurationError for activations on another device.
        """
        weight = self._transposed.new_zeros(self._transposed.shape[0], n_columns)
        weight[:, columns.to(weight.device)] = self._transposed
        bias, device = self.bias, weight.device

        def read(whole: Tensor) -> Tensor:
            if whole.device != device:
                raise _elsewhere(whole, device)
            return functional.linear(whole, weight, bias)

        return read

    def to(self, device: torch.device | str) -> LinearProbe:
        """Return this probe with its weights on `device`."""
        return LinearProbe(
            self.sites, self.weight.to(device), self.bias.to(device), tuple(self.heads)
        )

    @classmethod
    def folded(
        cls,
        sites: Sequence[Site],
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        std: Tensor,
        heads: Sequence[str],
    ) -> LinearProbe:
        """Fold standardisation into the weights.

        (x - mean) / std @ weight + bias = x @ (weight / std) + (bias - mean / std @ weight).
        Folded in float64, since mean / std may be large beside the bias.

        Args:
            sites: In the order of `sorted_sites`.
            weight: [F, K] for standardised features.
            bias: [K].
            mean: [F] of the raw features.
            std: [F] of the raw features, every one above 0.
            heads: K names.

        Raises:
            ConfigurationError: A std is not above 0, mean or std are not [F], or the
                folded probe is refused as in the class.
        """
        if mean.shape != weight.shape[:1] or std.shape != weight.shape[:1]:
            raise ConfigurationError(
                f"mean {tuple(mean.shape)} and std {tuple(std.shape)} must both be "
                f"{tuple(weight.shape[:1])}, one value a feature."
            )
        if not bool((std > 0).all()):
            raise ConfigurationError(
                f"std holds {float(std.min())}, wanted values above 0; set the std of constant "
                "features to 1 before folding."
            )
        scaled = weight.double() / std.double()[:, None]
        shifted = bias.double() - mean.double() @ scaled
        return cls(tuple(sites), scaled.float(), shifted.float(), tuple(heads))


def _elsewhere(features: Tensor, device: torch.device) -> ConfigurationError:
    # torch itself does not always object: a product with a meta tensor is whatever memory held.
    return ConfigurationError(
        f"features are on {features.device}, the probe on {device}; "
        "move the probe with probe.to(device)."
    )


def _require_finite_float32(name: str, value: Tensor) -> None:
    if value.dtype != torch.float32:
        raise ConfigurationError(f"{name} is {value.dtype}, wanted torch.float32; call .float().")
    if not bool(torch.isfinite(value).all()):
        count = int((~torch.isfinite(value)).sum())
        raise ConfigurationError(
            f"{name} holds {count} NaN or infinite values, wanted none; fit the probe again."
        )
