"""The parts of a decoder-only model that can be read, found by duck typing.

Knows the names that Hugging Face gives to decoder blocks, attention output
projections and MLP down projections, and the head geometry; no other
module does. Does not know hooks, probes or tokens, and does not import transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from safe_decode.activations.site import SiteKind
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.typing import CausalLM

__all__ = ["Architecture", "Block", "anatomy_of"]

# Order matters only where a block holds two of them, and no known family does.
_ATTN_OUT_PATHS = (
    "self_attn.o_proj",  # Llama, Qwen2/3, Gemma, Mistral, Mixtral, Phi-3
    "attn.c_proj",  # GPT-2
    "attention.dense",  # GPT-NeoX
    "self_attn.dense",  # Phi
    "self_attention.dense",  # Falcon, Bloom
    "self_attn.out_proj",  # OPT
    "attn.out_proj",  # GPT-J
)
_MLP_DOWN_PATHS = (
    "mlp.down_proj",  # Llama, Qwen2/3, Gemma, Mistral, Phi-3
    "mlp.c_proj",  # GPT-2
    "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon, Bloom
    "mlp.fc2",  # Phi
    "mlp.fc_out",  # GPT-J
    "fc2",  # OPT
)
_LAYER_LIST_NAMES = ("layers", "h", "blocks", "block")


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
        n_heads: Query heads of a block.
        head_dim: Channels of one head in the input of the attention output projection.
        n_kv_heads: Key-value heads of a block.
        d_model: Width of the residual stream.
        flattens_mlp: The MLP sees [batch * seq, d_ff] instead of [batch, seq, d_ff] (OPT).
    """

    blocks: tuple[Block, ...]
    n_heads: int
    head_dim: int
    n_kv_heads: int
    d_model: int
    flattens_mlp: bool = False

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
        if module is None:
            raise UnsupportedError(
                f"{kind} of layer {layer} cannot be read: {_why_unreadable(block.block, kind)}; "
                "use a resid site there."
            )
        return module

    def width(self, layer: int, kind: SiteKind) -> int:
        """Count the channels of an activation.

        Raises:
            ConfigurationError: `layer` is outside the model.
            UnsupportedError: The block has no readable module of this kind.
        """
        module = self.module(layer, kind)
        return self.d_model if kind == "resid" else _input_width(module)


def anatomy_of(model: CausalLM) -> Architecture:
    """Find the readable parts of a decoder-only causal language model.

    Args:
        model: A Hugging Face model with a `config`; adapters may be wrapped around its
            projections. Nothing is changed and nothing is run.

    Raises:
        UnsupportedError: No config, an encoder-decoder, or no single list of decoder
            blocks can be found.
    """
    config = _text_config(model)
    n_layers = _required_int(config, "num_hidden_layers")
    n_heads = _required_int(config, "num_attention_heads")
    d_model = _required_int(config, "hidden_size")
    blocks = tuple(
        Block(module, _first_found(module, _ATTN_OUT_PATHS), _first_found(module, _MLP_DOWN_PATHS))
        for module in _layer_list(model, n_layers)
    )
    return Architecture(
        blocks=blocks,
        n_heads=n_heads,
        head_dim=_head_dim(blocks, n_heads, d_model),
        n_kv_heads=_n_kv_heads(config, n_heads),
        d_model=d_model,
        flattens_mlp=getattr(config, "model_type", None) == "opt",
    )


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
    return get_text_config() if callable(get_text_config) else config


def _required_int(config: object, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedError(
            f"config.{name}={value!r} of {type(config).__name__} is not a positive int; "
            "this family is not supported."
        )
    return value


def _layer_list(model: CausalLM, n_layers: int) -> nn.ModuleList:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    root = decoder if isinstance(decoder, nn.Module) else model
    found = [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and name.rpartition(".")[2] in _LAYER_LIST_NAMES
    ]
    shallowest = min((name.count(".") for name, _ in found), default=0)
    top = [module for name, module in found if name.count(".") == shallowest]
    if len(top) != 1:
        raise UnsupportedError(
            f"model={type(model).__name__} has {len(top)} lists of {n_layers} decoder blocks "
            f"named one of {_LAYER_LIST_NAMES}, wanted exactly one; this family is not supported."
        )
    return top[0]


def _first_found(block: nn.Module, paths: tuple[str, ...]) -> nn.Module | None:
    for path in paths:
        module: object = block
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


def _input_width(projection: nn.Module) -> int:
    in_features = getattr(projection, "in_features", None)
    if isinstance(in_features, int):
        return in_features
    weight = getattr(projection, "weight", None)
    if weight is None or weight.ndim != 2:
        raise UnsupportedError(
            f"{type(projection).__name__} has no in_features and no 2-D weight, so its input "
            "width is unknown; use a resid site there."
        )
    # Conv1D of GPT-2 stores [in, out], the transpose of nn.Linear.
    return int(weight.shape[0 if type(projection).__name__ == "Conv1D" else 1])


def _head_dim(blocks: tuple[Block, ...], n_heads: int, d_model: int) -> int:
    # The projection's width is the truth: config.head_dim is absent in some families and
    # differs from d_model / n_heads in others (Gemma, Qwen3).
    for block in blocks:
        if block.attn_out is not None:
            return _input_width(block.attn_out) // n_heads
    return d_model // n_heads


def _n_kv_heads(config: object, n_heads: int) -> int:
    if getattr(config, "model_type", None) == "falcon":
        if getattr(config, "new_decoder_architecture", False):
            return int(config.num_kv_heads)  # type: ignore[attr-defined]  # Falcon only
        return 1 if getattr(config, "multi_query", False) else n_heads
    return int(getattr(config, "num_key_value_heads", None) or n_heads)


def _why_unreadable(block: nn.Module, kind: SiteKind) -> str:
    parts = {name.rpartition(".")[2] for name, _ in block.named_modules()}
    if kind == "mlp" and parts & {"experts", "block_sparse_moe", "router", "gate"}:
        return "its experts are fused into one parameter, without a module per expert to read"
    wanted = _ATTN_OUT_PATHS if kind == "attn" else _MLP_DOWN_PATHS
    return f"{type(block).__name__} has none of {', '.join(wanted)}"
