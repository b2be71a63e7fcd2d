"""The parts of a decoder-only model that can be read, found by duck typing.

Knows the names that Hugging Face gives to lists of decoder blocks, attention output projections,
MLP down projections and widths; no other module does. A projection is found by two names, that of
the module it stands in and its own, so a new family that combines known names needs no change
here. Does not know hooks, probes or tokens, and does not import transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from safe_decode.activations.families import why_refused
from safe_decode.activations.site import SiteKind
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.typing import CausalLM

__all__ = ["Architecture", "Block", "anatomy_of"]

_LAYER_LIST_NAMES = ("layers", "h", "blocks", "block", "layer")
_LAYER_COUNTS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers")

# Order matters only where a block holds two of them: then the first is read.
_ATTN_PARTS = (
    *("self_attn", "self_attention", "attn", "attention"),
    *("norm_attn_norm.attn", "multi_head_attention", "temporal_block", "attn.attention"),
)
_ATTN_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo", "output.dense")
# A bare `mixer` may be a recurrence, whose output projection has another name.
_ATTN_ALONE = ("mixer.o_proj",)
_MLP_PARTS = (
    *("mlp", "feed_forward", "feedforward", "ffn", "mlp_block", "shared_mlp", "mixer"),
    *("feed_forward.mlp",),
)
_MLP_DOWN = (
    *("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo", "Wo"),
    *("output_linear", "proj_down", "linear_out"),
)
# OPT and Bart hold theirs in the block itself, Bert in a module of two.
_MLP_ALONE = ("fc2", "output.dense")
# How many residual streams run side by side, where there are several: [batch, seq, n, d_model],
# read as one of n * d_model channels; or [n, batch, seq, d_model], which cannot be read.
_STREAM_COUNTS = ("hc_mult", "hc_count")
_STACKED_COUNTS = ("altup_num_inputs",)


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block.

    Attributes:
        block: The block itself; its output is the residual stream, [batch, seq, d_model].
        attn_out: Attention output projection, whose input has the heads concatenated;
            None where the block has none under a known name.
        mlp_down: MLP down projection, whose input holds the neurons; None where the
            experts are fused into one parameter, or the name is not known.
    """

    block: nn.Module
    attn_out: nn.Module | None
    mlp_down: nn.Module | None


@dataclass(frozen=True, eq=False)
class Architecture:
    """Where the activations of one model can be read.

    Attributes:
        blocks: Decoder blocks in the order of computation.
        n_heads: Query heads of a block; 0 in families without attention.
        head_dim: Channels of one head in the input of the attention output projection; 0
            without heads, or where blocks differ in it.
        n_kv_heads: Key-value heads of a block; 0 without heads.
        d_model: Width of the residual stream; of all of them where a block carries several in
            its last axes.
        flattens_mlp: The MLP sees [batch * seq, d_ff] instead of [batch, seq, d_ff] (OPT).
        stacked: Residual streams that a block carries in its first axis; only one can be read.
    """

    blocks: tuple[Block, ...]
    n_heads: int
    head_dim: int
    n_kv_heads: int
    d_model: int
    flattens_mlp: bool = False
    stacked: int = 1

    def module(self, layer: int, kind: SiteKind) -> nn.Module:
        """Return the module whose output (resid) or input (attn, mlp) is the activation.

        Args:
            layer: Decoder block, counted from 0.
            kind: Which activation of the block.

        Raises:
            ConfigurationError: `layer` is outside the model.
            UnsupportedError: The block has no readable module of this kind.
        """
        if not 0 <= layer < len(self.blocks):
            raise ConfigurationError(
                f"layer={layer} is outside this model's 0..{len(self.blocks) - 1}; "
                "pass a layer the probe was fitted on."
            )
        block = self.blocks[layer]
        module = {"resid": block.block, "attn": block.attn_out, "mlp": block.mlp_down}[kind]
        if kind == "resid" and self.stacked > 1:
            raise UnsupportedError(
                f"resid of layer {layer} cannot be read: {type(block.block).__name__} stacks "
                f"{self.stacked} residual streams, wanted one; use an attn or mlp site there."
            )
        if module is None:
            instead = "an attn or mlp" if self.stacked > 1 else "a resid"
            raise UnsupportedError(
                f"{kind} of layer {layer} cannot be read: {self._why_unreadable(block, kind)}; "
                f"use {instead} site there."
            )
        return module

    def width(self, layer: int, kind: SiteKind) -> int:
        """Count the channels of an activation.

        Raises:
            ConfigurationError: `layer` is outside the model.
            UnsupportedError: The block has no readable module of this kind.
        """
        module = self.module(layer, kind)
        if kind == "resid":
            return self.d_model
        width = _input_width(module)
        assert width is not None, "only projections of a known width are found"
        return width

    def _why_unreadable(self, block: Block, kind: SiteKind) -> str:
        name = type(block.block).__name__
        parts = {path.rpartition(".")[2] for path, _ in block.block.named_modules()}
        if kind == "mlp" and parts & {"experts", "block_sparse_moe", "router", "gate"}:
            return "its experts are fused into one parameter, without a module per expert to read"
        if kind == "attn" and self.n_heads == 0:
            return f"{name} has no attention heads, as its configuration says"
        if kind == "attn":
            outs, parts_of = ", ".join(_ATTN_OUT), ", ".join(_ATTN_PARTS)
            return f"{name} has no attention output projection: none of {outs} in one of {parts_of}"
        downs, parts_of = ", ".join(_MLP_DOWN), ", ".join(_MLP_PARTS)
        return f"{name} has no MLP down projection: none of {downs} in one of {parts_of}"


def anatomy_of(model: CausalLM) -> Architecture:
    """Find the readable parts of a decoder-only causal language model.

    Args:
        model: A Hugging Face model with a `config`; adapters may be wrapped around its
            projections. Of a model for images and text, the text decoder is read. Nothing is
            changed and nothing is run.

    Raises:
        UnsupportedError: No config, an encoder, an encoder-decoder, a family that is refused by
            name, or no single list of decoder blocks can be found.
    """
    config = _text_config(model)
    layers = _layer_list(model, config)
    _require_causal(model, layers)
    n_heads = _int_of(config, "num_attention_heads") or 0
    d_model = _required_int(config, "hidden_size")
    streams = max(_int_of(config, name) or 1 for name in _STREAM_COUNTS)
    blocks = tuple(
        Block(module, _first_found(module, _ATTN_PATHS), _first_found(module, _MLP_PATHS))
        for module in layers
    )
    return Architecture(
        blocks=blocks,
        n_heads=n_heads,
        head_dim=_head_dim(blocks, n_heads, d_model),
        n_kv_heads=_n_kv_heads(config, n_heads),
        d_model=d_model * streams,
        flattens_mlp=getattr(config, "model_type", None) == "opt",
        stacked=max(_int_of(config, name) or 1 for name in _STACKED_COUNTS),
    )


_ATTN_PATHS = (*(f"{part}.{out}" for part in _ATTN_PARTS for out in _ATTN_OUT), *_ATTN_ALONE)
_MLP_PATHS = (*(f"{part}.{out}" for part in _MLP_PARTS for out in _MLP_DOWN), *_MLP_ALONE)


def _text_config(model: CausalLM) -> object:
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedError(
            f"model={type(model).__name__} has no config; pass a Hugging Face causal language "
            "model."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"model={type(model).__name__} is an encoder-decoder; pass a decoder-only model."
        )
    get_text_config = getattr(config, "get_text_config", None)
    text_config = get_text_config() if callable(get_text_config) else config
    for one in (config, text_config):
        reason = why_refused(one)
        if reason is not None:
            raise UnsupportedError(f"model={type(model).__name__} is refused: {reason}.")
    return text_config


def _require_causal(model: CausalLM, layers: nn.ModuleList) -> None:
    """Refuse blocks that read what follows a position; Bert's say whether they do."""
    if any(getattr(layer, "is_decoder", True) is False for layer in layers):
        raise UnsupportedError(
            f"model={type(model).__name__} is an encoder: its positions read what follows them, so "
            "a score would change with the text behind it; load it with config.is_decoder=True, "
            "if it was trained so, or pass a decoder-only model."
        )


def _int_of(config: object, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # layers differ in it
        layers = getattr(config, "per_layer_config", ())
        value = max((_int_of(layer, name) or 0 for layer in layers), default=0)
    return value if isinstance(value, int) and value > 0 else None


def _required_int(config: object, name: str) -> int:
    value = _int_of(config, name)
    if value is None:
        raise UnsupportedError(
            f"config.{name} of {type(config).__name__} is not a positive int; this family is not "
            "supported."
        )
    return value


def _layer_list(model: CausalLM, config: object) -> nn.ModuleList:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    counts = {count for name in _LAYER_COUNTS if (count := _int_of(config, name))}
    # What some families call their decoder is only the head.
    named = _named_lists(decoder) if isinstance(decoder, nn.Module) else []
    named = named or _named_lists(model)
    # Some configurations count halves of blocks, or leave some out: then the list counts.
    found = [(name, module) for name, module in named if len(module) in counts] or named
    shallowest = min((name.count(".") for name, _ in found), default=0)
    top = [module for name, module in found if name.count(".") == shallowest]
    if len(top) != 1 or not len(top[0]):
        wanted = " or ".join(map(str, sorted(counts))) or "any number of"
        raise UnsupportedError(
            f"model={type(model).__name__} has {len(top)} lists of {wanted} decoder blocks "
            f"named one of {_LAYER_LIST_NAMES}, wanted exactly one; this family is not supported."
        )
    return top[0]


def _named_lists(root: nn.Module | CausalLM) -> list[tuple[str, nn.ModuleList]]:
    return [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in _LAYER_LIST_NAMES
    ]


def _first_found(block: nn.Module, paths: tuple[str, ...]) -> nn.Module | None:
    for path in paths:
        module: object = block
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.Module) and _input_width(module) is not None:
            return module
    return None


def _input_width(projection: nn.Module) -> int | None:
    in_features = getattr(projection, "in_features", None)
    if isinstance(in_features, int):
        return in_features
    weight = getattr(projection, "weight", None)
    if weight is None or weight.ndim != 2:
        return None
    # Conv1D of GPT-2 stores [in, out], the transpose of nn.Linear.
    return int(weight.shape[0 if type(projection).__name__ == "Conv1D" else 1])


def _head_dim(blocks: tuple[Block, ...], n_heads: int, d_model: int) -> int:
    # The projection's width is the truth: config.head_dim is absent in some families and
    # differs from d_model / n_heads in others (Gemma, Qwen3).
    if n_heads == 0:
        return 0
    found = {_input_width(b.attn_out) or 0 for b in blocks if b.attn_out is not None} or {d_model}
    return found.pop() // n_heads if len(found) == 1 else 0


def _n_kv_heads(config: object, n_heads: int) -> int:
    if getattr(config, "model_type", None) == "falcon":
        if getattr(config, "new_decoder_architecture", False):
            return int(config.num_kv_heads)  # type: ignore[attr-defined]  # Falcon only
        return 1 if getattr(config, "multi_query", False) else n_heads
    return _int_of(config, "num_key_value_heads") or n_heads
