"""What `generate` can do that is guarded, and what is refused by name, with the reason.

One table is the source of the check before the first token and of the README's table.
Knows option names and values. Does not know tensors, hooks or how the guard works, and
does not import transformers: configurations are read by duck typing. What the table does
not name is refused unless it has its default value, so that an option of a later version
cannot skip the guard in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from safe_decode.compiled import compiled_part
from safe_decode.errors import UnsupportedError

__all__ = ["TABLE", "Capability", "as_markdown", "require_supported", "require_supported_model"]

Status = Literal["supported", "installed", "ignored", "refused"]
"""installed: supported inside `with decoder.installed():`, refused outside. ignored: has no
effect in the supported modes, in bare `generate` neither."""


@dataclass(frozen=True)
class Capability:
    """One row of the table.

    Attributes:
        feature: The option as users write it: an argument of `generate`, a key of the
            generation configuration, or a property of the model.
        status: What becomes of a call that uses it.
        reason: Why it is refused, or what to know about it.
        instead: What to do instead; empty where it is supported.
        neutral: Values that do not use the feature; None never does.
        eager: Why it is refused inside `decoder.installed()`; empty where it is not.
    """

    feature: str
    status: Status
    reason: str = ""
    instead: str = ""
    neutral: tuple[object, ...] = ()
    eager: str = ""

    def is_used_by(self, value: object) -> bool:
        """Say whether `value` uses the feature."""
        if value is None:
            return False
        plain = isinstance(value, (bool, int, float, str))
        return not (plain and any(value == n for n in self.neutral))


def _supported(reason: str, *features: str) -> list[Capability]:
    return [Capability(feature, "supported", reason) for feature in features]


def _installed(reason: str, *features: str) -> list[Capability]:
    instead = "call inside `with decoder.installed():`, one session at a time"
    return [Capability(feature, "installed", reason, instead) for feature in features]


def _ignored(reason: str, *features: str) -> list[Capability]:
    return [Capability(feature, "ignored", reason) for feature in features]


def _refused(reason: str, instead: str, **features: tuple[object, ...]) -> list[Capability]:
    return [Capability(f, "refused", reason, instead, n) for f, n in features.items()]


_NO: tuple[object, ...] = (False,)
_CACHE = "cache_implementation"
_CACHES = ("dynamic", "hybrid", "static", "offloaded", "offloaded_static", "quantized")

TABLE: tuple[Capability, ...] = (
    *_supported("greedy and multinomial sampling", "do_sample", "temperature", "top_k", "top_p"),
    *_supported("", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *_supported("one guarded row a sequence", "num_return_sequences"),
    *_supported("", "max_new_tokens", "max_length", "min_new_tokens", "min_length"),
    *_supported("the tail is judged by a closing forward", "max_time", "stop_strings"),
    *_supported("runs before the guard", "logits_processor", "prefix_allowed_tokens_fn"),
    *_supported("the tail is judged by a closing forward", "stopping_criteria"),
    *_supported("runs before the guard", "repetition_penalty", "no_repeat_ngram_size"),
    *_supported("runs before the guard", "bad_words_ids", "sequence_bias", "suppress_tokens"),
    *_supported("runs before the guard", "begin_suppress_tokens", "forced_bos_token_id"),
    *_supported("runs before the guard", "forced_eos_token_id", "renormalize_logits"),
    *_supported("runs before the guard", "exponential_decay_length_penalty"),
    *_supported("", "generation_config", "input_ids", "inputs", "attention_mask", "tokenizer"),
    *_supported("", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *_supported("always on outside decoder.installed()", "disable_compile"),
    *_supported(
        "judged when whole; a beam that trips gives way to one that does not",
        "num_beams",
        "early_stopping",
        "length_penalty",
    ),
    *_supported(
        "one prompt; judged when whole",
        "assistant_model",
        "assistant_tokenizer",
        "prompt_lookup_num_tokens",
    ),
    *_supported("each option of the draft", "num_assistant_tokens", "max_matching_ngram_size"),
    *_supported("each option of the draft", "num_assistant_tokens_schedule"),
    *_supported("each option of the draft", "assistant_confidence_threshold"),
    *_supported("each option of the draft", "assistant_lookbehind", "target_lookbehind"),
    Capability(
        "prefill_chunk_size",
        "supported",
        "all chunks are heard",
        eager="a compiled graph keeps the newest chunk alone",
    ),
    *_supported("cached parts of the open turn are judged again", "past_key_values"),
    *_supported("judged as a raw completion; not with rewind", "inputs_embeds"),
    *_supported("steps recorded match what stands", "return_dict_in_generate", "output_scores"),
    *_supported("steps recorded match what stands", "output_logits", "output_attentions"),
    *_supported("steps recorded match what stands", "output_hidden_states"),
    *_supported("one row; gets what may be shown, when it may be", "streamer"),
    *_supported("", "max_cache_len", "cache_config"),
    *_installed(
        "a compiled graph skips hooks that come with a call",
        "torch.compile",
        "compile_config",
    ),
    *_ignored("of encoder-decoder models", "decoder_start_token_id"),
    *_ignored("of contrastive search", "low_memory"),
    *_refused(
        "transformers runs it in a foreign loop, which may call neither hooks nor processors",
        "pass num_beams alone",
        num_beam_groups=(1,),
        diversity_penalty=(0.0,),
        constraints=(),
        force_words_ids=(),
    ),
    *_refused(
        "the draft comes from the guarded layers themselves, or changes what is accepted",
        "pass assistant_model or prompt_lookup_num_tokens alone",
        assistant_early_exit=(0,),
        assistant_ensemble_weight=(),
        is_assistant=_NO,
        speculation_type=(),
        use_mtp=_NO,
    ),
    *_refused(
        "paged caches drop custom processors in silence, and unknown ones may",
        "pass dynamic, static, offloaded, offloaded_static or quantized",
        # "hybrid" in a hub configuration is unset by generate itself.
        cache_implementation=_CACHES,
    ),
    *_refused(
        "offloaded caches move layers over CUDA streams, and the model is not on CUDA",
        "move the model to CUDA, or pass dynamic, static or quantized as cache_implementation",
        cache_offloading=_NO,
    ),
    *_refused(
        "a second forward runs between the guard's score and the choice",
        "generate without guidance",
        guidance_scale=(1, 1.0),
        negative_prompt_ids=(),
        negative_prompt_attention_mask=(),
    ),
    *_refused(
        "contrastive search and DoLa run loops of their own",
        "use greedy or sampled generation",
        penalty_alpha=(0, 0.0),
        dola_layers=(),
    ),
    *_refused(
        "a foreign loop may call neither hooks nor processors",
        "use greedy or sampled generation",
        custom_generate=(),
        trust_remote_code=_NO,
    ),
    *_refused(
        "paged and continuous batching drop custom processors in silence",
        "call generate on one batch",
        continuous_batching_config=(),
    ),
    *_refused(
        "positions cannot be matched to tokens",
        "pass prompts, input_ids or inputs_embeds with their attention mask",
        position_ids=(),
        token_healing=_NO,
    ),
    *_refused(
        "NaN would be hidden from the guard",
        "leave remove_invalid_values off; a row with NaN is redirected",
        remove_invalid_values=_NO,
    ),
    *_refused(
        "redirected text would carry no watermark",
        "generate without watermarking_config",
        watermarking_config=(),
    ),
    *_refused(
        "the penalty is meant for encoder inputs",
        "pass repetition_penalty or no_repeat_ngram_size",
        encoder_repetition_penalty=(1.0,),
        encoder_no_repeat_ngram_size=(0,),
    ),
    *_refused("waits across devices are not tested", "run on one device", synced_gpus=_NO),
    *_refused(
        "the assistant turn is not one open sequence",
        "use a decoder-only model",
        is_encoder_decoder=_NO,
    ),
    *_refused(
        "dropout draws random numbers and makes scores noise",
        "call model.eval() first",
        training=_NO,
    ),
    *_refused(
        "a recurrent state cannot be judged again for the tail",
        "use an attention model",
        is_stateful=_NO,
    ),
    *_refused(
        "padding after the prompt would be scored as text",
        "set tokenizer.padding_side='left' and pass the attention mask",
        right_padding=_NO,
    ),
)

_BY_FEATURE = {capability.feature: capability for capability in TABLE}
# Bookkeeping of a GenerationConfig, not an option.
_BOOKKEEPING = frozenset({"transformers_version"})


def require_supported(
    model: Any,  # noqa: ANN401 - duck-typed
    options: Mapping[str, object],
    *,
    is_installed: bool = False,
) -> None:
    """Refuse a call that would skip the guard, before the first token.

    Args:
        model: A Hugging Face model; its `generation_config` fills what the call leaves open.
        options: Keyword arguments as for `model.generate`.
        is_installed: Whether taps stand where compiled graphs read them.

    Raises:
        UnsupportedError: An option is refused, or unknown to this version and not at its
            default. The message names it, the reason and what to do instead.
    """
    require_supported_model(model, is_installed=is_installed)
    own = getattr(model, "generation_config", None)
    given = options.get("generation_config")
    defaults = _defaults_of(own)
    for key, value in options.items():
        if key != "generation_config":
            _require(key, value, defaults.get(key), is_installed=is_installed)
    for config in (given, own):
        for key, value in _values_of(config).items():
            if options.get(key) is None and not (
                config is own and _values_of(given).get(key) is not None
            ):
                _require(key, value, defaults.get(key), is_installed=is_installed)
    kinds = (options.get(_CACHE), *(_values_of(config).get(_CACHE) for config in (given, own)))
    kind = next((kind for kind in kinds if kind is not None), "")
    _require("cache_offloading", "offloaded" in str(kind) and not _is_on_cuda(model))


def require_supported_model(model: Any, *, is_installed: bool = False) -> None:  # noqa: ANN401
    """Refuse a model in a state that cannot be guarded.

    Raises:
        UnsupportedError: Encoder-decoder, stateful, in training mode, or compiled without
            installed taps.
    """
    config = getattr(model, "config", None)
    _require("is_encoder_decoder", getattr(config, "is_encoder_decoder", False))
    _require("is_stateful", getattr(model, "_is_stateful", False))
    _require("training", getattr(model, "training", False))
    _require("torch.compile", compiled_part(model), is_installed=is_installed)


def as_markdown() -> str:
    """Render the table for the README, supported features first."""
    lines = ["| feature | status | note | instead |", "|---|---|---|---|"]
    for status in get_args(Status):
        grouped: dict[tuple[str, str], list[str]] = {}
        for row in TABLE:
            if row.status == status:
                reason = row.reason + (f"; not installed: {row.eager}" if row.eager else "")
                grouped.setdefault((reason, row.instead), []).append(f"`{row.feature}`")
        lines += [
            f"| {', '.join(features)} | {status} | {reason} | {instead} |"
            for (reason, instead), features in grouped.items()
        ]
    return "\n".join(lines) + "\n"


def _require(
    feature: str, value: object, default: object = None, *, is_installed: bool = False
) -> None:
    capability = _BY_FEATURE.get(feature)
    if capability is None:
        if value is None or feature in _BOOKKEEPING or _same(value, default):
            return
        raise UnsupportedError(
            f"{feature}={_shown(value)} is not known to this version of safe-decode and could skip "
            "the guard; leave it at its default."
        )
    if not capability.is_used_by(value):
        return
    if is_installed and capability.eager:
        raise UnsupportedError(
            f"{feature}={_shown(value)} is refused inside decoder.installed(): {capability.eager}; "
            "leave it out, or generate outside."
        )
    if capability.status == "refused" or (capability.status == "installed" and not is_installed):
        raise UnsupportedError(
            f"{feature}={_shown(value)} is refused: {capability.reason}; {capability.instead}."
        )


def _is_on_cuda(model: Any) -> bool:  # noqa: ANN401 - duck-typed
    return bool(getattr(getattr(model, "device", None), "type", None) == "cuda")


def _same(value: object, default: object) -> bool:
    return type(value) is type(default) and bool(value == default)


def _shown(value: object) -> str:
    plain = isinstance(value, (bool, int, float, str))
    return repr(value) if plain else f"<{type(value).__name__}>"


def _values_of(config: object) -> dict[str, object]:
    public = vars(config) if config is not None else {}
    return {key: value for key, value in public.items() if not key.startswith("_")}


def _defaults_of(config: object) -> dict[str, object]:
    """Read the defaults of the installed version from the class of a configuration."""
    if config is None:
        return {}
    fallback: Callable[[], dict[str, object]] = getattr(
        config, "_get_default_generation_params", dict
    )
    return {**_values_of(type(config)()), **fallback()}
