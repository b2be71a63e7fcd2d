"""Activations at sites with their gradients, for whoever attacks the probe.

The runtime's tap reads detached copies, as it must; an attacker with the weights does not
stop there. Knows hooks on one model for the time of one forward. Does not know losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site, sorted_sites
from safe_decode.typing import CausalLM

__all__ = ["GradientTap"]


class GradientTap:
    """Reads what `ActivationTap` reads, at the same sites in the same order, with a graph.

    Args:
        model: A decoder-only causal language model, run eagerly.
        sites: Where to read.

    Raises:
        ConfigurationError: A layer outside the model.
        UnsupportedError: The family or an activation is not readable.
    """

    def __init__(self, model: CausalLM, sites: Sequence[Site]) -> None:
        anatomy = anatomy_of(model)
        self.sites = sorted_sites(sites)
        self._modules = [anatomy.module(site.layer, site.kind) for site in self.sites]
        device = next(model.parameters()).device
        self._channels = [torch.tensor(site.channels, device=device) for site in self.sites]

    @contextmanager
    def reading(self, batch: int) -> Iterator[list[Tensor]]:
        """Record the forward of the block.

        Args:
            batch: Rows of the forward; some MLPs see rows and positions as one dimension.

        Yields:
            A list that holds one [batch, seq, channels] a site once the forward is done.
        """
        found: list[Tensor] = [torch.empty(0)] * len(self.sites)
        handles = []
        try:
            for index, (site, module) in enumerate(zip(self.sites, self._modules, strict=True)):
                keep = self._keep(found, index, batch)
                handles.append(
                    module.register_forward_hook(lambda _m, _a, out, keep=keep: keep(out))
                    if site.kind == "resid"
                    else module.register_forward_pre_hook(lambda _m, args, keep=keep: keep(args))
                )
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, found: list[Tensor], index: int, batch: int) -> Callable[[Any], None]:
        def keep(value: Tensor | tuple[Tensor, ...]) -> None:
            hidden = value[0] if isinstance(value, tuple) else value
            if hidden.ndim == 2:
                hidden = hidden.view(batch, -1, hidden.shape[-1])
            found[index] = hidden[..., self._channels[index]]

        return keep
