"""Standardisation of features folded into the first linear map of a probe.

Knows one map and the means and spreads of its inputs. Does not know kinds of probes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from safe_decode.errors import ConfigurationError

__all__ = ["FoldedMap", "fold_standardisation"]


class FoldedMap(NamedTuple):
    """A linear map of raw features: weight [F, N] and bias [N], float32."""

    weight: Tensor
    bias: Tensor


def fold_standardisation(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> FoldedMap:
    """Fold standardisation into a linear map.

    (x - mean) / std @ weight + bias = x @ (weight / std) + (bias - mean / std @ weight).
    Folded in float64, since mean / std may be large beside the bias.

    Args:
        weight: [F, N] for standardised features.
        bias: [N].
        mean: [F] of the raw features.
        std: [F] of the raw features, every one above 0.

    Raises:
        ConfigurationError: A std is not above 0, or mean or std are not [F].
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
    return FoldedMap(scaled.float(), shifted.float())
