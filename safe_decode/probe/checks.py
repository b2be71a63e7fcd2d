"""Checks that probes of every kind make of their tensors and of the features they are given.

Knows layouts and torch's tensors. Does not know what a kind computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from safe_decode.activations.site import Site, n_features, sorted_sites
from safe_decode.errors import ConfigurationError
from safe_decode.probe.layout import ProbeLayout

__all__ = ["require_features", "require_parts"]


def require_parts(
    layout: ProbeLayout,
    sites: tuple[Site, ...],
    tensors: Mapping[str, Tensor],
    heads: tuple[str, ...],
) -> None:
    """Check everything that a probe is built from.

    Args:
        layout: Of the probe's kind.
        sites: Where the features are read.
        tensors: By name.
        heads: Names of the logits.

    Raises:
        ConfigurationError: The sites are out of order, a name stands twice, or a tensor is of
            another shape, not float32, not finite, or on another device than the others.
    """
    if tuple(sites) != sorted_sites(sites):
        raise ConfigurationError("sites are out of order; pass sorted_sites(sites).")
    layout.require_shapes(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        n_features=n_features(sites),
        n_heads=len(heads),
    )
    if not heads or len(set(heads)) != len(heads):
        raise ConfigurationError(f"heads={heads} must be distinct names, at least one.")
    for name, tensor in tensors.items():
        _require_finite_float32(name, tensor)
    first, *others = tensors
    for name in others:
        if tensors[name].device != tensors[first].device:
            raise ConfigurationError(
                f"{first} is on {tensors[first].device} and {name} on {tensors[name].device}; use "
                "one device."
            )


def require_features(features: Tensor, n_channels: int, device: torch.device) -> None:
    """Check features before they are read.

    Args:
        features: [..., F].
        n_channels: F of the probe.
        device: Of the probe.

    Raises:
        ConfigurationError: F or the device is another than the probe's.
    """
    if features.shape[-1] != n_channels:
        raise ConfigurationError(
            f"features have {features.shape[-1]} channels, the probe reads "
            f"{n_channels}; tap the probe's own sites."
        )
    # torch itself does not always object: a product with a meta tensor is whatever memory held.
    if features.device != device:
        raise ConfigurationError(
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
