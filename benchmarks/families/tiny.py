"""Tiny random models of any family of transformers, made from the defaults of its configuration.

Sizes are found by the names that configurations give them; `OVERRIDES` holds what a family needs
besides. Nothing is downloaded. Knows names and sizes. Does not know the guard.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.families.overrides import OVERRIDES
from safe_decode.testing.models import BOS, CONTEXT, EOS, PAD, VOCAB_SIZE
from safe_decode.typing import CausalLM

__all__ = ["tiny_config", "tiny_model"]

_LAYERS, _WIDTH = 3, 32
_RANGE = 0.3
"""Of initial weights: wide, so that greedy tokens vary and activations move."""

_SIZES: Mapping[int, Sequence[str]] = {
    _WIDTH: (
        r"hidden_size|n_embd|d_model|embed_dim|embedding_dim|embedding_size|dim_model",
        r"word_embed_proj_dim|lru_width|out_hidden_size|projection_dim|attention_hidden_size",
        r"(text|cross_attention)_hidden_size|(output|input)_embedding_size",
        r"(pronunciation|shape)_embed_dim",
    ),
    _LAYERS: (
        r"num_hidden_layers|n_layers?|num_layers|num_blocks|depth",
        r"encoder_layers|decoder_layers|num_encoder_layers|num_decoder_layers",
    ),
    4: (
        r"(swa_)?num_attention_heads|n_heads?|num_heads|attention_heads",
        r"(num_)?(encoder|decoder)_attention_heads|swa_num_key_value_heads",
        r"linear_num_(value_|key_)?heads|mamba_(n|num)_heads|n_mamba_heads",
        r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts",
        r"mamba_dt_rank|time_step_rank",
    ),
    8: (
        r"head_dim|v_head_dim|qk_(nope_|rope_)?head_dim|index_head_dim|dim_head|kv_channels",
        r"linear_((key|value)_)?head_dim|swa_(v_)?head_dim|attention_head_(dim|size)",
        r"global_head_dim|swa_qk_rope_head_dim|rotary_dim|index_topk|laurel_rank|hc_lowrank",
        r"(q|kv|o)_lora_rank|dt_rank|hidden_size_per_layer_input|router_hidden_size",
        r"rel_extent|d_rel|mamba_d_state|state_size|ssm_state_(size|dim)|mamba_state_dim",
        r"chunk_size|mamba_chunk_size|block_size|block_length|patch_size|image_seq_length",
    ),
    16: (
        r"sliding_window(_size)?|attention_chunk_size|attention_window_size|window_size",
        r"mamba_d_head|mamba_head_dim|mamba_headdim|image_size",
    ),
    2 * _WIDTH: (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|intermediate_dim|inner_dim|dim_ff)",
        r"n_inner|d_inner|dff|feed_forward_size|mlp_dim|ffn_hidden_dim|intermediate_size_mlp",
    ),
    2: (r"num_experts_per_(tok|token)|top_k_experts|moe_k|moe_top_?k|moe_num_active.*",),
    1: (
        r"n_group|topk_group|num_expert_groups?|n_shared_experts|num_shared_experts",
        r"first_k_dense_replace|moe_layer_start_index|num_dense_layers",
        r"mamba_n_groups|n_groups|mamba_ngroups",
    ),
    0: (r"num_kv_shared_layers",),
    VOCAB_SIZE: (r"vocab_size|vocab_size_per_layer_input|(pronunciation|shape)_vocab_size",),
    CONTEXT: (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len(gth)?|max_sequence_length",
        r"context_length|max_(target|source)_positions|original_max_position_embeddings",
    ),
}
"""For each size, patterns of whole names; used where the default is an integer."""

_KV_HEADS = re.compile(r"num_key_value_heads|num_kv_heads|decoder_num_key_value_heads")
_RANGES = re.compile(r"initializer_range|init_std|initializer_std")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def tiny_config(model_type: str, class_name: str) -> PreTrainedConfig:
    """Shrink the default configuration of a class.

    Args:
        model_type: Of the family.
        class_name: Of transformers; of a composite family it may take the text part alone.

    Raises:
        ValueError: The family needs a value that is not among the overrides.
    """
    kind = getattr(transformers, class_name)
    config_class = kind.config_class or CONFIG_MAPPING[model_type]
    overrides = OVERRIDES.get(config_class.model_type, {})
    config: PreTrainedConfig = config_class(**_shrunk(config_class(), overrides))
    return config


def tiny_model(config: PreTrainedConfig, class_name: str, *, seed: int = 0) -> CausalLM:
    """Build a random float32 model in eval mode; the global random state is left as it was."""
    kind = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: CausalLM = kind(config).eval()
        for parameter in model.parameters():
            # Drawn anew where initial values are narrow, or all alike.
            if parameter.ndim > 1 and float(parameter.detach().float().std()) < _RANGE / 3:
                torch.nn.init.normal_(parameter, std=_RANGE)
    owner: Any = model
    # Of some families' own: bare and guarded calls are compared without beams and penalties.
    owner.generation_config = GenerationConfig(**_IDS)  # type: ignore[no-untyped-call]
    return model.to(torch.float32)


def _shrunk(default: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    own = {field.name for field in fields(default)} if is_dataclass(default) else set(vars(default))
    values = {name: value for name, value in vars(default).items() if name in own}
    places = _places(values, overrides)
    chosen: dict[str, Any] = {}
    for name, value in values.items():
        small = overrides.get(name, _small(name, value, values, places))
        if isinstance(value, PreTrainedConfig):
            nested = small if isinstance(small, Mapping) else {}
            small = type(value)(**_shrunk(value, nested))
        if small is not None:
            chosen[name] = small
    return {**chosen, **{name: v for name, v in overrides.items() if name not in chosen}}


def _small(
    name: str, value: object, values: Mapping[str, Any], places: Sequence[int]
) -> object | None:
    """Return the tiny value of one key; None: its default stays."""
    if name in _IDS:
        return _IDS[name]
    if name == "rope_parameters" and isinstance(value, dict) and value.get("rope_theta", 0) is None:
        return {**value, "rope_theta": 10_000.0}
    if isinstance(value, (list, tuple)):
        n_default = _first(values, _COUNTS)
        return [value[place] for place in places] if places and len(value) == n_default else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if _KV_HEADS.fullmatch(name):
        return 4 if value == _first(values, _HEADS) else 2
    if _RANGES.fullmatch(name):
        return _RANGE
    for size, patterns in _SIZES.items():
        if isinstance(value, int) and any(re.fullmatch(pattern, name) for pattern in patterns):
            return size
    return None


def _places(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[int]:
    """Choose layers so that each kind is among them: the first of each, then the next ones."""
    n_default, wanted = _first(values, _COUNTS), _first(overrides, _COUNTS) or _LAYERS
    if not n_default:
        return []
    per_layer = [
        value
        for value in values.values()
        if isinstance(value, (list, tuple))
        and len(value) == n_default
        and all(isinstance(item, str) for item in value)
    ]
    kinds = list(zip(*per_layer, strict=True))
    firsts = sorted({kinds.index(kind) for kind in kinds})[:wanted]
    others = [place for place in range(n_default) if place not in firsts]
    return sorted([*firsts, *others[: wanted - len(firsts)]])


def _first(values: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return next((values[name] for name in names if isinstance(values.get(name), int)), None)
