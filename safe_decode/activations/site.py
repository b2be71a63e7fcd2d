"""Where activations are read: the vocabulary shared by taps, probes and bundles.

Knows kinds, layers and channels. Does not know models, hooks or module names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from safe_decode.errors import ConfigurationError

__all__ = ["Site", "SiteKind", "n_features", "sorted_sites"]

SiteKind = Literal["resid", "attn", "mlp"]
"""resid: output of a decoder block, width d_model. attn: input of the attention
output projection, width n_heads * head_dim. mlp: input of the MLP down projection,
width d_ff."""


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """Channels of one activation of one layer.

    Attributes:
        layer: Decoder block, counted from 0.
        kind: Which activation of the block, see `SiteKind`.
        channels: Distinct channel indices, ascending.

    Raises:
        ConfigurationError: Unknown kind, negative layer, or channels that are empty,
            repeated, unsorted or negative.
    """

    layer: int
    kind: SiteKind
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in get_args(SiteKind):
            raise ConfigurationError(
                f"kind={self.kind!r} is not one of {get_args(SiteKind)}; pass one of these."
            )
        if self.layer < 0:
            raise ConfigurationError(f"layer={self.layer} is negative; layers count from 0.")
        ascending = all(a < b for a, b in zip(self.channels, self.channels[1:], strict=False))
        if not self.channels or self.channels[0] < 0 or not ascending:
            raise ConfigurationError(
                f"channels of {self.kind} in layer {self.layer} must be distinct, ascending and "
                f"not negative, got {self.channels[:8]}...; pass tuple(sorted(set(channels)))."
            )


def sorted_sites(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Order sites by layer, then kind, and refuse two sites on one activation.

    Features are concatenated in this order, channels ascending within a site.

    Raises:
        ConfigurationError: No site, or the same (layer, kind) twice.
    """
    ordered = tuple(sorted(sites))
    if not ordered:
        raise ConfigurationError("sites is empty; pass at least one Site.")
    for first, second in zip(ordered, ordered[1:], strict=False):
        if (first.layer, first.kind) == (second.layer, second.kind):
            raise ConfigurationError(
                f"two sites read {first.kind} of layer {first.layer}; merge their channels."
            )
    return ordered


def n_features(sites: Iterable[Site]) -> int:
    """Count the features that `sites` yield for one position."""
    return sum(len(site.channels) for site in sites)
