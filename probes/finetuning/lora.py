"""Units held still where a low-rank adapter (LoRA, PEFT) is trained beside them.

With an adapter the weight in use is W + s B A, and only A and B are trained. A row of W that
a unit owns stays what it was if the row of B is zero, a column of W if the column of A is
zero; then the merged update of the unit's weights is exactly zero, and merging leaves them
bit for bit. So these rows and columns are set to zero when training begins, and held there.

Knows PEFT's layers by their shape (`lora_A`, `lora_B`); does not import peft. Other adapters,
DoRA (whose norm couples all columns of a row) and adapters that have moved a frozen unit
already are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from probes.finetuning.unit_weights import WeightSlice
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.typing import CausalLM

__all__ = [
    "AdaptedModel",
    "carries_adapters",
    "held_in_adapters",
    "plain_architecture",
    "trained_in_adapters",
]


class AdaptedModel(CausalLM, Protocol):
    """A model that PEFT has wrapped."""

    def get_base_model(self) -> CausalLM:
        """Return the model inside the wrapper."""


class _Matrix(Protocol):
    weight: nn.Parameter


class _LoraLayer(Protocol):
    lora_A: Mapping[str, _Matrix]
    lora_B: Mapping[str, _Matrix]

    def get_base_layer(self) -> _Matrix: ...


def carries_adapters(model: CausalLM) -> TypeGuard[AdaptedModel]:
    """Say whether a model has been wrapped by PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def plain_architecture(model: AdaptedModel) -> CausalLM:
    """Return the wrapped model's architecture without adapters and without memory."""
    base = model.get_base_model()
    build: Any = type(base)
    with torch.device("meta"):
        plain: CausalLM = build(base.config)
    return plain


def held_in_adapters(model: AdaptedModel, owned: Sequence[WeightSlice]) -> tuple[WeightSlice, ...]:
    """Translate weights that are held into rows and columns of the adapters' matrices.

    Sets them to zero, in place, so that the merged update of what is held is zero.

    Args:
        model: Wrapped by PEFT.
        owned: Slices of the plain architecture's parameters.

    Raises:
        UnsupportedError: Another adapter than LoRA, DoRA, or weights that are not floats.
        ConfigurationError: The adapter has moved a held weight already.
    """
    layers = _Layers(model)
    held = []
    for part in owned:
        held += layers.held(part.name, part.dim, partial(_indices, part))
    return tuple(held)


def trained_in_adapters(
    model: AdaptedModel, owned: Sequence[WeightSlice]
) -> tuple[WeightSlice, ...]:
    """Hold everything that is trained but what belongs to `owned`; see `held_in_adapters`."""
    layers = _Layers(model)
    held: list[WeightSlice] = []
    own = {part.name: part for part in owned}
    for name, part in own.items():
        held += layers.held(name, part.dim, partial(_others, part))
    inside = {id(weight) for name in own for weight in layers.trained(name)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            # Nothing of this matrix is to move: its adapter must be as silent as it began.
            layers.require_silent(name, parameter)
            held.append(WeightSlice(name))
    return tuple(held)


_Chosen = Callable[[int], Tensor]
"""From the size of a dimension to the indices that are held."""


class _Layers:
    """The adapted layers of one model, found by the plain names of their weights."""

    def __init__(self, model: AdaptedModel) -> None:
        self.base = model.get_base_model()
        self.names = {id(p): name for name, p in model.named_parameters()}

    def trained(self, name: str) -> list[nn.Parameter]:
        """Return what is trained in place of a plain weight: A and B, or the weight itself."""
        layer, attribute = self._layer(name)
        if attribute == "weight" and hasattr(layer, "lora_A"):
            pairs = _pairs(layer)
            return [weight for pair in pairs for weight in pair]
        own = getattr(getattr(layer, "base_layer", layer), attribute, None)
        return [own] if isinstance(own, nn.Parameter) and own.requires_grad else []

    def held(self, name: str, dim: int, chosen: _Chosen) -> list[WeightSlice]:
        """Return the slices that hold a part of a plain weight, their entries set to zero."""
        layer, attribute = self._layer(name)
        if attribute == "weight" and hasattr(layer, "lora_A"):
            pairs = _pairs(layer)
            return [part for pair in pairs for part in self._of_pair(layer, pair, dim, chosen)]
        held = []
        for own in self.trained(name):  # a bias, or a matrix trained in full beside adapters
            held.append(WeightSlice(self.names[id(own)], dim, chosen(own.shape[dim])))
        return held

    def _of_pair(
        self,
        layer: _LoraLayer,
        pair: tuple[nn.Parameter, nn.Parameter],
        dim: int,
        chosen: _Chosen,
    ) -> list[WeightSlice]:
        a, b = pair
        weight = layer.get_base_layer().weight
        if not weight.is_floating_point():
            raise UnsupportedError(
                f"an adapted weight is of {weight.dtype}: merging into quantised weights rounds "
                "all of them anew; load the model in a floating-point dtype."
            )
        # Conv1D of GPT-2 stores [in, out]; A and B are [rank, in] and [out, rank] all the same.
        transposed = type(layer.get_base_layer()).__name__ == "Conv1D"
        is_output = (dim == 0) != transposed
        factor, along = (b, 0) if is_output else (a, 1)
        indices = chosen(factor.shape[along])
        there = factor.detach().index_select(along, indices.to(factor.device))
        if bool(there.any()) and (is_output or bool(b.detach().any())):
            raise _moved(self.names[id(factor)])
        with torch.no_grad():
            factor.index_fill_(along, indices.to(factor.device), 0)
        return [WeightSlice(self.names[id(factor)], along, indices)] if len(indices) else []

    def require_silent(self, name: str, parameter: nn.Parameter) -> None:
        """Refuse a B that has moved already where nothing of its matrix may move."""
        if ".lora_B." in name and bool(parameter.detach().any()):
            raise _moved(name)

    def _layer(self, name: str) -> tuple[Any, str]:
        path, _, attribute = name.rpartition(".")
        layer = self.base.get_submodule(path)
        dora = any(getattr(layer, "use_dora", {}).values()) if hasattr(layer, "lora_A") else False
        foreign = hasattr(layer, "base_layer") and not hasattr(layer, "lora_A")
        if dora or foreign or hasattr(layer, "modules_to_save"):
            raise UnsupportedError(
                f"{path} is adapted by {'DoRA' if dora else type(layer).__name__}: only plain LoRA "
                "is held still; pass a LoraConfig without use_dora and modules_to_save."
            )
        return layer, attribute


def _pairs(layer: _LoraLayer) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in layer.lora_A]


def _indices(part: WeightSlice, size: int) -> Tensor:
    return torch.arange(size) if part.indices is None else part.indices


def _others(part: WeightSlice, size: int) -> Tensor:
    others = torch.ones(size, dtype=torch.bool)
    if part.indices is None:
        return torch.zeros(0, dtype=torch.long)
    others[part.indices] = False
    return others.nonzero().flatten()


def _moved(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name} is not zero where a unit is held: the adapter has moved it already; begin with a "
        "fresh adapter whose lora_B is zero."
    )
