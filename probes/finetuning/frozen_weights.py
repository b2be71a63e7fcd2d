"""Weights held still: a copy of them, and hooks that keep gradients away.

A frozen gradient is taken away as soon as it has been accumulated, so that clipping norms
and an optimizer's moments never see it. Decoupled weight decay and old momentum move the
weight all the same, hence the copy, written back after every step.

Knows parameters, gradients and bits. Does not know units, optimizers or training loops.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from probes.finetuning.unit_weights import WeightSlice
from safe_decode.typing import CausalLM

__all__ = ["HeldWeights"]


class HeldWeights:
    """Holds some weights of one model from its making until `release`.

    Args:
        model: Hooks are put on its parameters.
        slices: What is held, every parameter at most once.
        offload: Keep the copy in CPU memory rather than beside the parameters.
    """

    def __init__(
        self, model: CausalLM, slices: Sequence[WeightSlice], *, offload: bool = False
    ) -> None:
        parameters = dict(model.named_parameters())
        self._parts = [_Part(parameters[part.name], part, offload=offload) for part in slices]
        self._handles: list[RemovableHandle] = []
        for part in self._parts:
            if part.parameter.requires_grad:
                register = part.parameter.register_post_accumulate_grad_hook
                self._handles.append(register(part.mask))  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """Write the copy back, in place."""
        for part in self._parts:
            part.restore()

    def release(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def digest(self) -> str:
        """Return a digest of which weights are held, and of their bits."""
        state = hashlib.blake2b(digest_size=16)
        for part in self._parts:
            state.update(f"{part.name}\x1f{part.dim}\x1f{part.saved.dtype}\x1f".encode())
            if part.indices is not None:
                state.update(_bits(part.indices))
            state.update(_bits(part.saved))
        return state.hexdigest()


class _Part:
    """The rows or columns of one parameter that are held, or all of it."""

    def __init__(self, parameter: nn.Parameter, part: WeightSlice, *, offload: bool) -> None:
        self.name, self.dim, self.parameter = part.name, part.dim, parameter
        self.indices = None if part.indices is None else part.indices.to(parameter.device)
        data = parameter.detach()
        kept = data.clone() if self.indices is None else data.index_select(self.dim, self.indices)
        self.saved = kept.cpu() if offload else kept

    def mask(self, parameter: Tensor) -> None:
        if self.indices is None:
            parameter.grad = None  # the optimizer passes over it and keeps no moments for it
        elif parameter.grad is not None:
            parameter.grad.index_fill_(self.dim, self.indices, 0)

    def restore(self) -> None:
        saved = self.saved.to(self.parameter.device)
        with torch.no_grad():
            if self.indices is None:
                self.parameter.copy_(saved)
            else:
                self.parameter.index_copy_(self.dim, self.indices, saved)


def _bits(values: Tensor) -> bytes:
    flat = values.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()
