"""What a bundle was made for: the model, its tokenizer and how it computes.

Knows how to digest them quickly: every parameter is sampled, none is read whole. Does
not know bundles or probes. An edit that leaves all sampled values as they were is not
seen; training, merging, quantising and casting change them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from safe_decode.bundle.number_format import GGUF_TYPES, number_format
from safe_decode.errors import FingerprintMismatchError
from safe_decode.typing import CausalLM, Tokenizer
from safe_decode.weight_digests import weight_digests

__all__ = ["CONFIG_KEYS", "Fingerprint", "config_value"]

# Keys that change what is computed; the rest (dropout, caching, output options, names) does
# not, and new versions of transformers add to it.
CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "max_position_embeddings",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "layer_types",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "use_parallel_residual",
    "parallel_attn",
    "new_decoder_architecture",
    "multi_query",
    "alibi",
    "do_layer_norm_before",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Fingerprint:
    """Everything a probe depends on, digested.

    Attributes:
        architecture: Config keys that change computation, each value as JSON.
        tokenizer: Digest of the vocabulary, merges and added tokens.
        template: Digest of the chat template; "none" without one.
        weights: Digest of sampled values a decoder block, and one for the rest.
        adapters: Names of the adapters on the model; those that do not compute say so.
        quantisation: Its configuration as JSON; "none" without.
        dtype: Of the parameters, several joined by a comma.
    """

    architecture: Mapping[str, str]
    tokenizer: str
    template: str
    weights: Mapping[str, str]
    adapters: tuple[str, ...]
    quantisation: str
    dtype: str

    @classmethod
    def of(cls, model: CausalLM, tokenizer: Tokenizer) -> Fingerprint:
        """Digest a model and its tokenizer, without a forward.

        Args:
            model: Loaded; its parameters may be on any devices, and offloaded by accelerate.
            tokenizer: Of transformers.

        Raises:
            UnsupportedError: Parameters are on the meta device, and nothing brings them back.
        """
        config: Any = model.config
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        quantisation = _quantisation(model)
        template = getattr(tokenizer, "chat_template", None)
        return cls(
            architecture=_architecture(text_config),
            tokenizer=_tokenizer_digest(tokenizer),
            template="none" if template is None else _digest(_json(template).encode()),
            weights=weight_digests(model.named_parameters(), model=model),
            adapters=_adapter_names(model),
            quantisation="none" if quantisation is None else _json(quantisation),
            dtype=",".join(sorted({str(p.dtype) for p in model.parameters()})),
        )

    @classmethod
    def of_checkpoint(
        cls,
        config: object,
        tokenizer: Tokenizer,
        parameters: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
    ) -> Fingerprint:
        """Digest weights as they lie on the disk, for an engine that holds them in its own shape.

        Args:
            config: Of the text model.
            tokenizer: Of transformers.
            parameters: All of them by name, not quantised; of each only a few values are read.
            dtype: That the engine computes in.

        Returns:
            What `of` returns for the same model of transformers in this dtype.
        """
        template = getattr(tokenizer, "chat_template", None)
        return cls(
            architecture=_architecture(config),
            tokenizer=_tokenizer_digest(tokenizer),
            template="none" if template is None else _digest(_json(template).encode()),
            weights=weight_digests(parameters, dtype=dtype),
            adapters=(),
            quantisation="none",
            dtype=str(dtype),
        )

    @property
    def number_format(self) -> str:
        """The name of the numbers that the model computes in, as certificates state it."""
        return number_format(self.dtype, self.quantisation)

    def differences(self, other: Fingerprint, *, but: Sequence[str] = ()) -> list[str]:
        """Name everything in which the model at hand, `other`, is not this one.

        Args:
            other: Of the model at hand.
            but: Attributes that are not compared.
        """
        return [
            line
            for field in fields(self)
            if field.name not in but
            for line in _differences(
                field.name, getattr(self, field.name), getattr(other, field.name)
            )
        ]

    def require_sizes(self, sizes: Mapping[str, int]) -> None:
        """Check what a configuration says of sizes, before weights are loaded.

        Args:
            sizes: Entries of the configuration of the model at hand.

        Raises:
            FingerprintMismatchError: An entry that was recorded differs.
        """
        known = {name: self.architecture[name] for name in sizes if name in self.architecture}
        differing = _differences("config", known, {name: str(sizes[name]) for name in known})
        if differing:
            raise _mismatch(differing)

    def require(self, other: Fingerprint) -> None:
        """Check that a model is the one this fingerprint was taken of.

        Args:
            other: Of the model at hand.

        Raises:
            FingerprintMismatchError: Any field differs; all that do are named.
        """
        differing = self.differences(other)
        if differing:
            raise _mismatch(differing)


def _mismatch(differing: Sequence[str]) -> FingerprintMismatchError:
    return FingerprintMismatchError(
        f"the bundle was made for another model: {'; '.join(differing)}; load the model, "
        "tokenizer and dtype it was made for, or make a bundle for this one."
    )


_Value = str | tuple[str, ...] | Mapping[str, str]


def _architecture(config: object) -> dict[str, str]:
    return {
        key: _json(value) for key in CONFIG_KEYS if (value := config_value(config, key)) is not None
    }


def config_value(config: object, key: str) -> object:
    """Read a key of a configuration: None where it is not there, a list where layers differ."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # what transformers raises where each layer has a value of its own
        layers: Any = config
        return [getattr(layer, key, None) for layer in layers.per_layer_config]


def _differences(name: str, wanted: _Value, got: _Value) -> list[str]:
    if not isinstance(wanted, Mapping):
        return [] if wanted == got else [f"{name} is {got!r}, wanted {wanted!r}"]
    got = cast("Mapping[str, str]", got)  # a field has one type
    keys = [key for key in {**wanted, **got} if wanted.get(key) != got.get(key)]
    if name == "weights" and keys:
        shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        return [f"weights of {shown} differ"]
    return [f"config {key} is {got.get(key)}, wanted {wanted.get(key)}" for key in keys]


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Only the model part: padding and truncation in the same file are state of the last call.
    merges = json.loads(backend.to_str())["model"].get("merges") if backend is not None else None
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    vocab = sorted(tokenizer.get_vocab().items())
    return _digest(_json([vocab, merges, added]).encode())


_GGML_TYPES = ("ggml_type", "gate_up_type", "down_type")
"""Attributes of the modules with which transformers replaces packed layers."""
# Ids of `enum ggml_type` in ggml.h, which never change; transformers packs these.
_GGML_NAMES = {
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS"},
    **{19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M"},
}


def _quantisation(model: CausalLM) -> dict[str, Any] | None:
    config: Any = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    found: dict[str, Any] = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    if found.get("quant_method") == "gguf":
        # Where the file lies computes nothing; the kinds of its blocks do. Of architectures that
        # transformers does not keep packed, nothing but the configuration says "gguf".
        held = [getattr(m, name, None) for m in model.modules() for name in _GGML_TYPES]
        kinds = {kind for kind in held if isinstance(kind, int)}
        if not kinds:
            return None
        found = {name: value for name, value in found.items() if name != "gguf_file"}
        found[GGUF_TYPES] = [_GGML_NAMES.get(kind, f"type{kind}") for kind in sorted(kinds)]
    return found


def _adapter_names(model: CausalLM) -> tuple[str, ...]:
    names: Any = getattr(model, "peft_config", None) or {}
    layers: list[Any] = [m for m in model.modules() if hasattr(type(m), "_active_adapter")]
    active = {
        name for layer in layers if not layer.disable_adapters for name in layer.active_adapters
    }
    is_silent = {name: bool(layers) and name not in active for name in names}
    return tuple(sorted(f"{n} (not active)" if is_silent[n] else n for n in names))
