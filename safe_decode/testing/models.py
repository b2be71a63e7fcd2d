"""Tiny random models of several families and a byte-level tokenizer, built in code.

`tiny_model(family)` and `byte_tokenizer()` are for every test; nothing is downloaded.
Weights are drawn wide (`initializer_range` 0.3), so that greedy tokens vary and the
activations move, and are a function of (family, seed) alone.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from safe_decode.typing import CausalLM

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, END = range(len(SPECIAL_TOKENS))
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
N_LAYERS, D_MODEL, D_FF, N_HEADS, CONTEXT = 3, 32, 64, 4, 256

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

FAMILIES = ("llama", "qwen2", "gemma", "gpt2", "gpt_neox")
"""The families every law is tested on."""
MORE_FAMILIES = (
    "qwen3",
    "gemma2",
    "gemma3",
    "mistral",
    "mistral_window",
    "phi3",
    "phi",
    "falcon",
    "opt",
)
"""Further families with readable attention and MLP projections."""


_IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    **_IDS,
}
_GATED = {**_COMMON, "intermediate_size": D_FF}
_GROUPED = {**_GATED, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": D_MODEL,
    "n_inner": D_FF,
    "n_layer": N_LAYERS,
    "n_head": N_HEADS,
    "n_positions": CONTEXT,
    "initializer_range": 0.3,
    **_IDS,
}
_OPT = {**_COMMON, "ffn_dim": D_FF, "word_embed_proj_dim": D_MODEL, "init_std": 0.3}
_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _GROUPED),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 16}),
    "gemma": (GemmaConfig, {**_GATED, "num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": (Gemma2Config, {**_GROUPED, "head_dim": 16, "sliding_window": 16}),
    "gemma3": (Gemma3TextConfig, {**_GROUPED, "head_dim": 16, "sliding_window": 16}),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": None}),
    "mistral_window": (MistralConfig, {**_GROUPED, "sliding_window": 16}),
    "phi3": (Phi3Config, _GROUPED),
    "phi": (PhiConfig, _GATED),
    "gpt2": (GPT2Config, _GPT2),
    "gpt_neox": (GPTNeoXConfig, _GATED),
    "falcon": (FalconConfig, _COMMON),
    "opt": (OPTConfig, _OPT),
    "mixtral": (MixtralConfig, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> CausalLM:
    """A random float32 model in eval mode; `changes` go to its config.

    The global random state is left as it was.
    """
    config_class, values = _CONFIGS[family]
    config = config_class(**{**values, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: CausalLM = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model.eval()


def byte_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One id a byte after the special tokens; left-padding; any text round-trips."""
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
