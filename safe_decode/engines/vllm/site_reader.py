"""The activations of one forward at the probe's sites, read inside one of vLLM's models.

The residual stream comes from the model itself, where it hands over auxiliary hidden states; else
from a hook on the block. Neurons and heads are inputs of projections, copied by hooks into a
buffer, so that a compiled region copies them too. Rows of a forward are positions of all its
requests, one after the other.

Knows vLLM's decoder blocks and sites. Does not know probes, slots or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site, sorted_sites
from safe_decode.errors import ConfigurationError, UnsupportedError

if TYPE_CHECKING:
    from safe_decode.typing import CausalLM

__all__ = ["SiteReader"]


class SiteReader:
    """Reads the sites of one model.

    Args:
        model: Of vLLM, built and not yet run.
        sites: Where to read.
        most_rows: Rows that a forward may have.
        device: Of the model.
        dtype: Of its activations.

    Raises:
        ConfigurationError: A layer or channel outside the model.
        UnsupportedError: A block without a projection that a site reads.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        *,
        most_rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.sites = sorted_sites(sites)
        self._places: dict[int, int] = {}
        anatomy = anatomy_of(cast("CausalLM", model))
        width = sum(len(site.channels) for site in self.sites)
        self._rows = torch.full((most_rows, width), torch.nan, dtype=dtype, device=device)
        auxiliary = _auxiliary_layers(model, self.sites)
        self._auxiliary: list[tuple[slice, Tensor]] = []
        begin = 0
        for site in self.sites:
            end = begin + len(site.channels)
            module = anatomy.module(site.layer, site.kind)
            if site.channels[-1] >= anatomy.width(site.layer, site.kind):
                raise ConfigurationError(
                    f"channel {site.channels[-1]} of {site.kind} in layer {site.layer} is outside "
                    f"0..{anatomy.width(site.layer, site.kind) - 1}; use the bundle's own model."
                )
            channels = torch.tensor(site.channels, device=device)
            columns = slice(begin, end)
            if site.kind == "resid" and auxiliary:
                self._auxiliary.append((columns, channels))
            elif site.kind == "resid":
                module.register_forward_hook(_residual_hook(self._rows, columns, channels))
            else:
                module.register_forward_pre_hook(_input_hook(self._rows, columns, channels))
            begin = end
        if auxiliary:
            model.set_aux_hidden_state_layers(auxiliary)  # type: ignore[operator]  # vLLM's

    def split(self, output: Tensor | tuple[Tensor, Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """Take apart what the model's forward returned.

        Args:
            output: The hidden states [rows, d_model], and auxiliary ones where they were asked
                for.

        Returns:
            The hidden states, and features [rows, F] in the order of the sites, a view that the
            next forward overwrites.

        Raises:
            UnsupportedError: The model handed over other auxiliary states than were asked for.
        """
        hidden, auxiliary = output if isinstance(output, tuple) else (output, ())
        if len(auxiliary) != len(self._auxiliary):
            raise UnsupportedError(
                f"the model hands over {len(auxiliary)} auxiliary hidden states, wanted "
                f"{len(self._auxiliary)}; use vllm>=0.32 and no other user of them."
            )
        n_rows = len(hidden)
        for (columns, channels), states in zip(self._auxiliary, auxiliary, strict=True):
            self._rows[:n_rows, columns].copy_(states.index_select(-1, channels))
        return hidden, self._rows[:n_rows]

    def forget(self, features: Tensor) -> None:
        """Make features no numbers, so that a forward which skips a hook closes its rows."""
        features.fill_(torch.nan)


def _auxiliary_layers(model: nn.Module, sites: Sequence[Site]) -> tuple[int, ...]:
    """Return how many blocks stand before each residual site; empty if the model has no such way.

    Ascending, as the model hands them over.
    """
    from vllm.model_executor.models.interfaces import EagleModelMixin, supports_eagle3

    holder = getattr(model, "model", None)
    if not supports_eagle3(model) or not isinstance(holder, EagleModelMixin):
        return ()
    return tuple(site.layer + 1 for site in sites if site.kind == "resid")


def _residual_hook(
    rows: Tensor, columns: slice, channels: Tensor
) -> Callable[[nn.Module, object, tuple[Tensor, Tensor]], None]:
    def keep(_module: nn.Module, _given: object, output: tuple[Tensor, Tensor]) -> None:
        hidden, residual = output
        stream = hidden + residual
        rows[: stream.shape[0], columns].copy_(stream.index_select(-1, channels))

    return keep


def _input_hook(
    rows: Tensor, columns: slice, channels: Tensor
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        rows[: given[0].shape[0], columns].copy_(given[0].index_select(-1, channels))

    return keep
