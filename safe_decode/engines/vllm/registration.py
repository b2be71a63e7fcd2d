"""Which architectures of vLLM are guarded, and the hooks through which the guard comes into one.

A class of ours is registered over each architecture that is guarded. Every other architecture
that vLLM knows gets a hook that refuses it: an engine that is told to be guarded serves no bare
model. Knows vLLM's two registries. Does not know what our classes do.
"""

from __future__ import annotations

import importlib
from typing import Any

from safe_decode.errors import UnsupportedError

__all__ = ["GUARDED", "register_architectures"]

GUARDED = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}
"""Architectures that are guarded, each with its module in `vllm.model_executor.models`."""

_CLASSES = "safe_decode.engines.vllm.guarded_classes"


def register_architectures() -> None:
    """Register our classes and configuration hooks; a second time changes nothing.

    Raises:
        UnsupportedError: This version of vLLM lacks what the guard stands on.
    """
    try:
        models = importlib.import_module("vllm.model_executor.models")
        hooks = importlib.import_module("vllm.model_executor.models.config").MODELS_CONFIG_MAP
        importlib.import_module("vllm.v1.worker.gpu.sample.logits_processor.interface")
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"this vLLM lacks what the guard stands on ({error}), wanted vllm>=0.32; install "
            "'safe-decode[vllm]'."
        ) from error
    from safe_decode.engines.vllm.configuration import hooked

    for name in models.ModelRegistry.get_supported_archs():
        present: Any = hooks.get(name)
        hooks[name] = hooked(present, is_guarded=name in GUARDED)
    for name in GUARDED:
        models.ModelRegistry.register_model(name, f"{_CLASSES}:{name}")
