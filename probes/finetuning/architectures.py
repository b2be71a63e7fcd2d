"""The matrices that write a unit: their names and layouts, family by family.

Of a two-matrix module f(X) = B s(A X), `safe_decode.activations.architecture` finds B; here are the
rows of A that belong to some heads or neurons. Knows names and the order of rows. Does not know
units' scores, parameters or training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from safe_decode.activations.architecture import Architecture
from safe_decode.errors import UnsupportedError

__all__ = ["OutputRows", "head_writers", "neuron_writers", "output_width"]

_SPLIT_QKV = ("q_proj", "k_proj", "v_proj")  # Llama, Qwen, Gemma, Mistral, Phi, OPT, GPT-J
_FUSED_QKV = ("c_attn", "qkv_proj")  # GPT-2, Phi-3: all queries, then all keys, then all values
_GROUPED_QKV = "query_key_value"  # GPT-NeoX, Bloom, Falcon: group by group queries, key, value
_GATED = ("gate_proj", "up_proj")  # Llama, Qwen, Gemma, Mistral
_FUSED_GATE = "gate_up_proj"  # Phi-3: all gates, then all ups
_PLAIN_UP = ("c_fc", "dense_h_to_4h", "fc1", "fc_in")  # GPT-2, GPT-NeoX / Falcon, Phi / OPT, GPT-J


class OutputRows(NamedTuple):
    """Output channels of a linear map.

    Attributes:
        module: The linear map.
        channels: Which of its outputs, ascending.
    """

    module: nn.Module
    channels: tuple[int, ...]


def head_writers(
    attention: nn.Module, anatomy: Architecture, heads: Sequence[int], groups: Sequence[int]
) -> tuple[OutputRows, ...]:
    """Find the query rows of some heads and the key and value rows of some groups.

    Args:
        attention: The module that holds the projections.
        anatomy: Of the model, for the geometry.
        heads: Query heads.
        groups: Key-value heads.

    Raises:
        UnsupportedError: No projection has a known name, or one has another size.
    """
    size, per_group = anatomy.head_dim, anatomy.n_heads // anatomy.n_kv_heads
    queries, keys = anatomy.n_heads * size, anatomy.n_kv_heads * size
    if split := _children(attention, _SPLIT_QKV):
        wanted = ((heads, queries), (groups, keys), (groups, keys))
        return tuple(
            _rows(module, _blocks(chosen, size), width)
            for module, (chosen, width) in zip(split, wanted, strict=True)
        )
    for name in _FUSED_QKV:
        if fused := _children(attention, (name,)):
            blocks = [
                *heads,
                *(anatomy.n_heads + group for group in groups),
                *(anatomy.n_heads + anatomy.n_kv_heads + group for group in groups),
            ]
            return (_rows(fused[0], _blocks(blocks, size), queries + 2 * keys),)
    if fused := _children(attention, (_GROUPED_QKV,)):
        stride = per_group + 2  # the queries of a group, then its key, then its value
        blocks = [head // per_group * stride + head % per_group for head in heads]
        blocks += [group * stride + per_group + part for group in groups for part in (0, 1)]
        return (_rows(fused[0], _blocks(blocks, size), queries + 2 * keys),)
    raise _unknown(attention, "a head", (*_SPLIT_QKV, *_FUSED_QKV, _GROUPED_QKV))


def neuron_writers(mlp: nn.Module, neurons: Sequence[int], width: int) -> tuple[OutputRows, ...]:
    """Find the rows that write some neurons, of the gate too where there is one.

    Args:
        mlp: The module that holds the projections.
        neurons: Which.
        width: Neurons of the layer.

    Raises:
        UnsupportedError: No projection has a known name, or one has another size.
    """
    if gated := _children(mlp, _GATED):
        return tuple(_rows(module, neurons, width) for module in gated)
    if fused := _children(mlp, (_FUSED_GATE,)):
        both = [*neurons, *(width + neuron for neuron in neurons)]
        return (_rows(fused[0], both, 2 * width),)
    for name in _PLAIN_UP:
        if plain := _children(mlp, (name,)):
            return (_rows(plain[0], neurons, width),)
    raise _unknown(mlp, "a neuron", (*_GATED, _FUSED_GATE, *_PLAIN_UP))


def output_width(linear: nn.Module) -> int | None:
    """Count the outputs of a linear map; None where its weight is no matrix."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return None
    # Conv1D of GPT-2 stores [in, out], the transpose of nn.Linear.
    return int(weight.shape[1 if type(linear).__name__ == "Conv1D" else 0])


def _children(module: nn.Module, names: Sequence[str]) -> tuple[nn.Module, ...]:
    """Return the children of these names, or none unless all are there."""
    found = [getattr(module, name, None) for name in names]
    modules = tuple(child for child in found if isinstance(child, nn.Module))
    return modules if len(modules) == len(names) else ()


def _blocks(blocks: Iterable[int], size: int) -> list[int]:
    return [block * size + channel for block in blocks for channel in range(size)]


def _rows(module: nn.Module, channels: Sequence[int], width: int) -> OutputRows:
    if output_width(module) != width:
        raise UnsupportedError(
            f"{type(module).__name__} has {output_width(module)} outputs, wanted {width} for "
            "this model's heads and neurons; this layout is not supported."
        )
    return OutputRows(module, tuple(sorted(channels)))


def _unknown(module: nn.Module, unit: str, names: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(
        f"{type(module).__name__} has none of {', '.join(names)}, so which weights write {unit} "
        "is not known; this family is not supported."
    )
