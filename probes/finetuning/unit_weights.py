"""Which weights belong to a unit.

A unit of a two-matrix module f(X) = B s(A X) owns its column of B and the rows of A that
write it. MLP neuron j owns column j of the down projection, row j of the up projection and
of the gate where there is one, and entry j of their biases. Attention head h owns its
`head_dim` columns of the output projection and its rows of the query, key and value
projections with their biases. In one sentence, which a test states: a unit owns exactly the
weights whose gradient vanishes when its channels are taken out of the input of B.

Under grouped-query attention the key and value rows of a group belong to all its query
heads together; `Shared` says when a set of heads owns them. The biases of B, norms (those
of queries and keys too), embeddings and the output head belong to no unit.

Knows parameters, rows and columns. The names are in `architectures`. Does not know training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from probes.finetuning.architectures import OutputRows, head_writers, neuron_writers
from probes.location.units import UnitSet
from safe_decode.activations.architecture import Architecture, anatomy_of
from safe_decode.activations.site import SiteKind
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.typing import CausalLM

__all__ = ["Shared", "WeightSlice", "complement", "owned_weights"]

Shared = Literal["any", "all"]
"""When a set of heads owns the key and value rows that several heads share: `any`, as soon
as one of those heads is in the set; `all`, only when all of them are."""

_KINDS: tuple[SiteKind, ...] = ("attn", "mlp")  # as `UnitScores.kind` counts them


@dataclass(frozen=True, eq=False)
class WeightSlice:
    """Some rows or columns of one parameter, or all of it.

    Attributes:
        name: Of the parameter, as in `model.named_parameters()`.
        dim: Along which `indices` count.
        indices: [n] int64 on the CPU, ascending; None for the whole parameter.
    """

    name: str
    dim: int = 0
    indices: Tensor | None = None

    def count(self, parameter: Tensor) -> int:
        """Count the entries of the parameter that are meant."""
        if self.indices is None:
            return parameter.numel()
        return parameter.numel() // parameter.shape[self.dim] * len(self.indices)


def owned_weights(
    model: CausalLM, units: UnitSet, *, shared: Shared = "any"
) -> tuple[WeightSlice, ...]:
    """Name the weights that a set of units owns, every parameter at most once.

    Args:
        model: The model on which the units were located.
        units: Any of its units.
        shared: See `Shared`.

    Raises:
        ConfigurationError: A unit is outside the model, or `shared` is unknown.
        UnsupportedError: The model carries adapters, its weights are quantised or sharded,
            or a matrix has a name or a size that is not known.
    """
    if shared not in get_args(Shared):
        raise ConfigurationError(f"shared={shared!r} is not one of {get_args(Shared)}; pass one.")
    _require_plain_weights(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, WeightSlice] = {}
    for module in _two_matrix_modules(model, units):
        chosen = module.chosen(units)
        for parameter, dim, channels in module.owned(chosen, shared):
            name = names[id(parameter)]
            if name in found:
                raise UnsupportedError(
                    f"{name} serves several layers, so no unit of one layer owns a part of it; "
                    "use a model whose layers have weights of their own."
                )
            found[name] = WeightSlice(name, dim, torch.tensor(channels, dtype=torch.long))
    return tuple(part for part in found.values() if part.indices is None or len(part.indices))


def complement(model: CausalLM, slices: Sequence[WeightSlice]) -> tuple[WeightSlice, ...]:
    """Name all weights of the model that are not in `slices`."""
    owned = {part.name: part for part in slices}
    rest = []
    for name, parameter in model.named_parameters():
        part = owned.get(name)
        if part is None:
            rest.append(WeightSlice(name))
        elif part.indices is not None:
            others = torch.ones(parameter.shape[part.dim], dtype=torch.bool)
            others[part.indices] = False
            if bool(others.any()):
                rest.append(WeightSlice(name, part.dim, others.nonzero().flatten()))
    return tuple(rest)


@dataclass(frozen=True, eq=False)
class _TwoMatrix:
    """One module f(X) = B s(A X): the heads or the neurons of a layer.

    Attributes:
        anatomy: Of the model.
        layer: Decoder block.
        kind: 0 for heads, 1 for neurons.
        reader: B.
        holder: The module that holds A and B.
    """

    anatomy: Architecture
    layer: int
    kind: int
    reader: nn.Module
    holder: nn.Module

    @property
    def width(self) -> int:
        """Count the input channels of B."""
        return self.anatomy.width(self.layer, _KINDS[self.kind])

    def chosen(self, units: UnitSet) -> list[int]:
        """Return the units that lie here, ascending, and refuse those that cannot."""
        here = units.index[(units.layer == self.layer) & (units.kind == self.kind)]
        head_dim = self.anatomy.head_dim
        limit = self.width // (head_dim if self.kind == 0 else 1)
        wrong_size = self.kind == 0 and units.head_dim != head_dim
        if wrong_size or int(here.min()) < 0 or int(here.max()) >= limit:
            raise ConfigurationError(
                f"units name {_KINDS[self.kind]} unit {int(here.max())} of layer {self.layer} and "
                f"head_dim={units.head_dim}, this model has 0..{limit - 1} there and "
                f"head_dim={head_dim}; pass units located on this model."
            )
        return sorted({int(index) for index in here})

    def owned(
        self, chosen: Sequence[int], shared: Shared
    ) -> Iterator[tuple[nn.Parameter, int, Sequence[int]]]:
        """Yield each parameter with the dimension and the channels that are owned."""
        writers = self._writers(chosen, shared)
        self._require_all_known(writers)
        for module, channels in writers:
            yield module.weight, _dims(module).output, channels  # type: ignore[misc]
            if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
                yield bias, 0, channels
        size = self.anatomy.head_dim if self.kind == 0 else 1
        columns = [unit * size + channel for unit in chosen for channel in range(size)]
        yield self.reader.weight, _dims(self.reader).input, columns  # type: ignore[misc]

    def _writers(self, chosen: Sequence[int], shared: Shared) -> tuple[OutputRows, ...]:
        if self.kind == 1:
            return neuron_writers(self.holder, chosen, self.width)
        n_groups = self.anatomy.n_kv_heads
        per_group = self.anatomy.n_heads // n_groups
        members = np.bincount([head // per_group for head in chosen], minlength=n_groups)
        groups = np.flatnonzero(members >= (1 if shared == "any" else per_group)).tolist()
        return head_writers(self.holder, self.anatomy, chosen, groups)

    def _require_all_known(self, writers: Sequence[OutputRows]) -> None:
        """Refuse a module with further matrices: a unit might own a part of those."""
        if self.holder is self.anatomy.blocks[self.layer].block:  # OPT: no module for the MLP
            return
        known = {id(module.weight) for module in (self.reader, *(row.module for row in writers))}
        for name, parameter in self.holder.named_parameters():
            if parameter.ndim >= 2 and id(parameter) not in known:
                raise UnsupportedError(
                    f"{type(self.holder).__name__} of layer {self.layer} holds {name}, a matrix "
                    "of unknown use, so what belongs to a unit is not known; this family is not "
                    "supported."
                )


def _two_matrix_modules(model: CausalLM, units: UnitSet) -> Iterator[_TwoMatrix]:
    """Yield the modules in which units lie, in the order of computation."""
    anatomy = anatomy_of(model)
    holders = {id(child): module for module in model.modules() for child in module.children()}
    pairs = zip(units.layer.tolist(), units.kind.tolist(), strict=True)
    for layer, kind in sorted(set(pairs)):
        reader = anatomy.module(layer, _KINDS[kind])  # refuses a layer that is not there
        yield _TwoMatrix(anatomy, layer, kind, reader, holders[id(reader)])


class _Dims(NamedTuple):
    output: int
    input: int


def _dims(linear: nn.Module) -> _Dims:
    """Say along which dimension of its weight a linear map's outputs and inputs lie."""
    # Conv1D of GPT-2 stores [in, out], the transpose of nn.Linear.
    return _Dims(1, 0) if type(linear).__name__ == "Conv1D" else _Dims(0, 1)


def _require_plain_weights(model: CausalLM) -> None:
    """Refuse a model whose trained weights are not the model's own matrices."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") or hasattr(module, "base_layer"):
            raise UnsupportedError(
                f"{name or type(model).__name__} carries an adapter (PEFT): what is trained is "
                "not the unit's weights but a product added to them; train in full, or merge the "
                "adapter first with merge_and_unload()."
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh"):
            raise UnsupportedError(
                f"{name} is sharded over devices (DeepSpeed, FSDP), so its rows are not all here; "
                "train on one device or with plain data parallelism."
            )
        if not parameter.is_floating_point():
            raise UnsupportedError(
                f"{name} is of {parameter.dtype}: quantised weights are not trained; load the "
                "model in a floating-point dtype."
            )
