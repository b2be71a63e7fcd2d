"""Take units out of a model for as long as a block runs.

A unit of f(X) = B s(A X) is removed where B reads it: its channels are replaced by zero, or
by their mean over given responses, before B multiplies. That is what setting its column of
B to zero does (and, for the mean, adding the column's share to B's bias), but no weight is
written, so that afterwards the model is bit for bit what it was.

Knows hooks, channels and fills. Does not know why units are removed, nor what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from probes.location.importance import ChannelMoments
from probes.location.units import UnitSet, sites_of
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site
from safe_decode.errors import ConfigurationError
from safe_decode.typing import CausalLM

__all__ = ["Fill", "removed", "removed_sites"]

Fill = Literal["zero", "mean"]
"""zero: the channel is silent. mean: it says always the same, its mean over responses, so
that what is lost is what it says about this one."""


@contextmanager
def removed(
    model: CausalLM,
    units: UnitSet,
    *,
    fill: Fill = "zero",
    means: Sequence[ChannelMoments] = (),
) -> Iterator[None]:
    """Remove units from a model while the block runs, whatever it raises.

    Args:
        model: Any causal language model with readable projections; its weights are not
            written. Every forward within the block is of the ablated model.
        units: Located on this model; an empty set removes nothing.
        fill: See `Fill`.
        means: From `location.locate.channel_moments` on the same model, wanted for `mean`.

    Raises:
        ConfigurationError: Unknown fill, no means, or a unit outside the model.
        UnsupportedError: A projection cannot be read.
    """
    with removed_sites(model, sites_of(units) if len(units) else (), fill=fill, means=means):
        yield


@contextmanager
def removed_sites(
    model: CausalLM,
    sites: Sequence[Site],
    *,
    fill: Fill = "zero",
    means: Sequence[ChannelMoments] = (),
) -> Iterator[None]:
    """Remove channels; see `removed`."""
    if fill not in get_args(Fill):
        raise ConfigurationError(f"fill={fill!r} is not one of {get_args(Fill)}; pass one.")
    anatomy = anatomy_of(model)
    said = {(m.layer, m.kind): m for m in means}
    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            reader = anatomy.module(site.layer, site.kind)
            width = anatomy.width(site.layer, site.kind)
            if site.kind == "resid" or max(site.channels) >= width:
                raise ConfigurationError(
                    f"{site.kind} channel {max(site.channels)} of layer {site.layer} is no unit "
                    f"of this model, whose width there is {width}; pass units located on it."
                )
            handles.append(reader.register_forward_pre_hook(_Without(site, width, fill, said)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Without:
    """A hook that replaces channels of the input of one projection."""

    def __init__(
        self, site: Site, width: int, fill: Fill, means: Mapping[Any, ChannelMoments]
    ) -> None:
        self.gone = torch.zeros(width, dtype=torch.bool)
        self.gone[list(site.channels)] = True
        self.value = torch.zeros(width)
        if fill == "mean":
            found = means.get((site.layer, site.kind))
            if found is None or len(found.mean) != width:
                raise ConfigurationError(
                    f"means hold nothing that fits {site.kind} of layer {site.layer}; pass the "
                    "moments that channel_moments took on this model."
                )
            self.value = torch.from_numpy(found.mean).float()

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        read: Tensor = inputs[0]
        if self.gone.device != read.device:
            self.gone, self.value = self.gone.to(read.device), self.value.to(read.device)
        # where, not a product: an infinite activation is removed too.
        kept = torch.where(self.gone, self.value.to(read.dtype), read)
        return (kept, *inputs[1:])
