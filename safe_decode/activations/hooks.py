"""The hooks of one tap: each hands a site's activation to whoever listens in this context.

Knows what modules take and return. Does not know where hooks are installed, or who listens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safe_decode.activations.pieces import site_name
from safe_decode.activations.recorder import ForwardRecorder
from safe_decode.activations.site import Site
from safe_decode.activations.visitor import ActivationVisitor
from safe_decode.errors import BeatError
from safe_decode.host_copies import sent

__all__ = ["HookFactory", "Listener"]

Listener = ForwardRecorder | ActivationVisitor


@dataclass(frozen=True)
class HookFactory:
    """Makes the hooks of one tap.

    Attributes:
        owner: The tap, the key of its listener.
        listeners: Returns the listeners of this context, by tap.
    """

    owner: Any
    listeners: Callable[[], Mapping[Any, Listener]]

    def input(self, index: int, site: Site, width: int) -> Callable[[Any, Any], None]:
        """Make the hook of a module whose input is read; arguments as `output`."""
        hear = self.output(index, site, width)

        def hook(module: object, args: tuple[Any, ...]) -> None:
            hear(module, args, args)

        return hook

    def output(self, index: int, site: Site, width: int) -> Callable[[Any, Any, Any], None]:
        """Make the hook of a module whose output is read.

        Args:
            index: Of the site.
            site: Its channels are read.
            width: Channels of the activation.
        """
        owner, listeners = self.owner, self.listeners
        # Channels are distinct and in order, so that as many as there are is all of them.
        channels = None if len(site.channels) == width else torch.tensor(site.channels)

        def hook(_module: object, _args: object, activation: object) -> None:
            nonlocal channels
            recorder = listeners().get(owner)
            if recorder is None or not recorder.is_open:
                return
            hidden = activation if isinstance(activation, Tensor) else _first(activation, site)
            if hidden.ndim == 2 and recorder.batch:
                hidden = hidden.view(recorder.batch, -1, hidden.shape[-1])
            elif hidden.ndim == 4 and hidden.shape[2] * hidden.shape[3] == width:
                hidden = hidden.flatten(2)  # streams side by side, see `Architecture.d_model`
            elif hidden.ndim != 3:
                raise BeatError(
                    f"{site_name(site)} has shape {tuple(hidden.shape)}, wanted "
                    "[batch, seq, width]."
                )
            if channels is not None and channels.device != hidden.device:
                channels = sent(channels, hidden.device)
            recorder.hear(index, hidden.detach() if hidden.requires_grad else hidden, channels)

        return hook


def _first(activation: object, site: Site) -> Tensor:
    first = activation[0] if isinstance(activation, (tuple, list)) and activation else None
    if isinstance(first, Tensor):
        return first
    raise BeatError(
        f"{site_name(site)} yields {type(activation).__name__}, wanted a tensor or a tuple that "
        "starts with one."
    )
