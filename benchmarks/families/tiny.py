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

N_LAYERS = 3
_WIDTH = 32
_RANGE = 0.3
"""Of initial weights: wide, so that greedy tokens vary and activations move."""

_SIZES: Sequence[tuple[str, int | str]] = (
    (r"(hidden_size|n_embd|d_model|embed_dim|embedding_dim|embedding_size|dim_model)", _WIDTH),
    (r"(word_embed_proj_dim|lru_width|out_hidden_size|projection_dim|attention_hidden_size)", _WIDTH),
    (r"(text_hidden_size|output_embedding_size|input_embedding_size|cross_attention_hidden_size)", _WIDTH),
    (r"(num_hidden_layers|n_layers?|num_layers|num_blocks|depth)", N_LAYERS),
    (r"(encoder_layers|decoder_layers|num_encoder_layers|num_decoder_layers)", N_LAYERS),
    (r"(num_attention_heads|n_heads?|num_heads|attention_heads|swa_num_attention_heads)", 4),
    (r"(encoder_attention_heads|decoder_attention_heads|linear_num_value_heads)", 4),
    (r"(num_(encoder|decoder)_attention_heads|swa_num_key_value_heads|linear_num_key_heads)", 4),
    (r"(head_dim|v_head_dim|qk_(nope_|rope_)?head_dim|index_head_dim|dim_head|kv_channels)", 8),
    (r"(linear_(key|value)_head_dim|swa_head_dim|attention_head_(dim|size)|swa_v_head_dim)", 8),
    (r"(global_head_dim|swa_qk_rope_head_dim)", 8),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank|laurel_rank|hc_lowrank|dt_rank)", 8),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|intermediate_dim|inner_dim|dim_ff)", 64),
    (r"(n_inner|d_inner|feed_forward_size|mlp_dim|ffn_hidden_dim)", 64),
    (r"(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)", 4),
    (r"(num_experts_per_(tok|token)|top_k_experts|moe_k|moe_top_?k|moe_num_active.*)", 2),
    (r"(n_group|topk_group|num_expert_groups?|n_shared_experts|num_shared_experts)", 1),
    (r"(first_k_dense_replace|moe_layer_start_index|num_dense_layers)", 1),
    (r"(vocab_size|vocab_size_per_layer_input)", VOCAB_SIZE),
    (r"(hidden_size_per_layer_input|router_hidden_size|rel_extent|d_rel)", 8),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len(gth)?|max_sequence_length)", CONTEXT),
    (r"(context_length|max_target_positions|max_source_positions|original_max_pos.*)", CONTEXT),
    (r"(sliding_window(_size)?|attention_chunk_size|attention_window_size|window_size)", 16),
    (r"(mamba_d_state|state_size|ssm_state_size|mamba_state_dim|ssm_state_dim)", 8),
    (r"(mamba_n_heads|mamba_num_heads|n_mamba_heads)", 4),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim)", 16),
    (r"(mamba_n_groups|n_groups|mamba_ngroups)", 1),
    (r"(chunk_size|mamba_chunk_size|block_size|block_length)", 8),
    (r"(mamba_dt_rank|time_step_rank)", 4),
    (r"(index_topk|rotary_dim)", 8),
    (r"num_kv_shared_layers", 0),
    (r"image_size", 16),
    (r"(patch_size|image_seq_length)", 8),
    (r"(initializer_range|init_std|initializer_std)", 1),
)
"""A pattern of the whole name, and the size; only where the default is a number."""

_KV_HEADS = re.compile(r"(num_key_value_heads|num_kv_heads|decoder_num_key_value_heads)")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Shrink the default configuration of a family."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_shrunk(config_class(), OVERRIDES.get(model_type, {})))


def _config_of(model_type: str, kind: Any) -> PreTrainedConfig:
    """Shrink a configuration, and take the part of it that a class of text models wants."""
    config, wanted = tiny_config(model_type), kind.config_class
    return config if wanted is None or isinstance(config, wanted) else config.get_text_config()


def tiny_model(model_type: str, class_name: str, *, seed: int = 0) -> CausalLM:
    """Build a random float32 model in eval mode; the global random state is left as it was."""
    kind = getattr(transformers, class_name)
    config = _config_of(model_type, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: CausalLM = kind(config).eval()
        _widen(model)
    owner: Any = model
    # Of some families' own: bare and guarded calls are compared without beams and penalties.
    owner.generation_config = GenerationConfig(**_IDS)
    return model.to(torch.float32)


def _widen(model: CausalLM) -> None:
    """Draw matrices whose initial values are all alike, or narrow, anew."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and float(parameter.detach().float().std()) < 0.1:
            torch.nn.init.normal_(parameter, std=_RANGE)


def _shrunk(default: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    own = {field.name for field in fields(default)} if is_dataclass(default) else set(vars(default))
    values = {k: v for k, v in vars(default).items() if k in own and not k.startswith("_")}
    chosen: dict[str, Any] = {}
    n_default = next((values[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if n in values), None)
    places = _places(values, n_default, overrides)
    for name, value in values.items():
        if name in overrides:
            continue
        if isinstance(value, PreTrainedConfig):
            chosen[name] = _as_kept(value, _shrunk(value, {}))
        elif name == "rope_parameters" and isinstance(value, dict) and "rope_theta" in value:
            chosen[name] = {"rope_type": "default", "rope_theta": value["rope_theta"] or 10_000.0}
        elif name in _IDS:
            chosen[name] = _IDS[name]
        elif isinstance(value, (list, tuple)) and places and len(value) == n_default:
            chosen[name] = [value[place] for place in places]
        else:
            sized = _size_of(name, value, values)
            if sized is not None:
                chosen[name] = sized
    for name, value in overrides.items():
        own = values.get(name)
        if isinstance(own, PreTrainedConfig) and isinstance(value, Mapping):
            chosen[name] = _as_kept(own, _shrunk(own, value))
        else:
            chosen[name] = value
    return {name: value for name, value in chosen.items() if value is not _DROPPED}


_DROPPED = object()


def _as_kept(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig:
    return type(config)(**values)


def _places(values: Mapping[str, Any], n_default: int | None, overrides: Mapping[str, Any]) -> list[int]:
    """Choose layers so that each kind is there: the first of each, then the next ones."""
    if not n_default:
        return []
    wanted = next((overrides[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if n in overrides), N_LAYERS)
    per_layer = [
        v for k, v in values.items()
        if isinstance(v, (list, tuple)) and len(v) == n_default and all(isinstance(i, str) for i in v)
    ]
    kinds = list(zip(*per_layer, strict=True)) if per_layer else []
    firsts = sorted({kinds.index(kind) for kind in kinds})[:wanted]
    others = [i for i in range(n_default) if i not in firsts]
    return sorted([*firsts, *others[: wanted - len(firsts)]])


def _size_of(name: str, value: object, values: Mapping[str, Any]) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if _KV_HEADS.fullmatch(name):
        heads = next((values[n] for n in _HEADS if n in values), value)
        return 4 if value == heads else 2
    if re.fullmatch(r"(initializer_range|init_std|initializer_std)", name):
        return _RANGE
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return size  # type: ignore[return-value]
    return None
