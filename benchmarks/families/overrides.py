"""What a family's tiny configuration needs beside its shrunk sizes, by its model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["OVERRIDES"]

_DECODER = {"is_decoder": True}
_ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
# So many that no scores of the indexer are zero together: ties are broken by the length.
_INDEXER = {"index_n_heads": 16}
_QSA = {
    **{"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_budget": 8, "indexer_compress_ratio": 2},
}
_MIXED = ["linear_attention", "full_attention", "linear_attention"]
_SHARED = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_PLAIN = {"rope_parameters": _ROPE, "head_dim": 8}
_MROPE = {**_ROPE, "mrope_section": [2, 1, 1]}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(_ENCODERS, _DECODER),
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa"), _INDEXER),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _PLAIN),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), {"text_config": {"rope_parameters": _MROPE}}),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {**_EXPERTS, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _MIXED},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": _QSA,
    "reformer": {**_DECODER, "attn_layers": ["local", "lsh", "local"], "axial_pos_embds": False},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "zamba": {
        **{"num_hidden_layers": 4, "layers_block_type": _SHARED, "n_mamba_heads": 2},
        **{"attention_hidden_size": 64, "attention_head_dim": 16},
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": _SHARED},
    "zaya": {"num_experts_per_tok": 1},
}
