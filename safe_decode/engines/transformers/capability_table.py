"""The table: what `generate` can do, whether it is guarded, and what it does to a certificate.

Knows option names, their values that use nothing, and reasons as users read them. Does not know
calls or configurations; those are checked by `capabilities`, and against certificates by
`coverage`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["EFFECTS", "TABLE", "WRAPPERS", "Capability", "Effect", "Status"]

Status = Literal["supported", "installed", "ignored", "served", "refused"]
"""installed: supported inside `with decoder.installed():`, refused outside. ignored: has no
effect in the supported modes, in bare `generate` neither. served: an option of requests to the
server; the library refuses it."""

Effect = Literal["same", "shortens", "certified", "sampled", "voids", "refused"]

EFFECTS: dict[Effect, str] = {
    "same": "stays valid: the same responses, in exact arithmetic",
    "shortens": "stays valid: a shorter response has no larger maximum",
    "certified": "valid at the certified value",
    "sampled": "valid at the certified value; without meaning in greedy decoding",
    "voids": "void",
    "refused": "",
}
"""What the use of an option does to the certificate of a call, in the words of the table."""


@dataclass(frozen=True)
class Capability:
    """One row of the table.

    Attributes:
        feature: The option as users write it: an argument of `generate`, a key of the
            generation configuration, a property of the model, or a state of torch.
        status: What becomes of a call that uses it.
        effect: What becomes of the certificate of a call that runs, see `EFFECTS`.
        reason: Why it is refused, or what to know about it.
        instead: What to do instead; empty where it is supported.
        neutral: Values that do not use the feature; None never does.
        eager: Why it is refused inside `decoder.installed()`; empty where it is not.
        voiding: Values among `neutral` that depart from a certificate all the same.
    """

    feature: str
    status: Status
    effect: Effect
    reason: str = ""
    instead: str = ""
    neutral: tuple[object, ...] = ()
    eager: str = ""
    voiding: tuple[object, ...] = ()

    def is_used_by(self, value: object) -> bool:
        """Say whether `value` uses the feature."""
        if value is None:
            return False
        plain = isinstance(value, (bool, int, float, str))
        return not (plain and any(value == n for n in self.neutral))

    def departs_with(self, value: object) -> bool:
        """Say whether `value` departs from what a certificate without a record of it covers."""
        if isinstance(value, (list, tuple, dict)) and not value:
            return False
        plain = isinstance(value, (bool, int, float, str))
        return self.is_used_by(value) or (plain and any(value == v for v in self.voiding))


def _rows(effect: Effect, reason: str, *features: str) -> list[Capability]:
    return [Capability(feature, "supported", effect, reason) for feature in features]


def _moves(effect: Effect, reason: str, **features: tuple[object, ...]) -> list[Capability]:
    return [Capability(f, "supported", effect, reason, neutral=n) for f, n in features.items()]


def _installed(reason: str, *features: str) -> list[Capability]:
    instead = "call inside `with decoder.installed():`, one session at a time"
    return [Capability(feature, "installed", "same", reason, instead) for feature in features]


def _ignored(reason: str, *features: str) -> list[Capability]:
    return [Capability(feature, "ignored", "same", reason) for feature in features]


def _served(**features: tuple[object, ...]) -> list[Capability]:
    instead = "pass sequence_bias or repetition_penalty to generate"
    reason = "an option of requests to the server"
    return [Capability(f, "served", "voids", reason, instead, n) for f, n in features.items()]


def _refused(reason: str, instead: str, **features: tuple[object, ...]) -> list[Capability]:
    return [Capability(f, "refused", "refused", reason, instead, n) for f, n in features.items()]


_NO: tuple[object, ...] = (False,)
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
"""Classes that run a model in copies or parts, by name."""
_CACHES = ("dynamic", "hybrid", "static", "offloaded", "offloaded_static", "quantized")

TABLE: tuple[Capability, ...] = (
    *_rows("certified", "greedy and multinomial sampling", "do_sample"),
    *_rows("sampled", "", "temperature", "top_k", "top_p", "top_h"),
    *_moves("sampled", "", min_p=(0.0,), typical_p=(1.0,), epsilon_cutoff=(0.0,)),
    *_moves("sampled", "", eta_cutoff=(0.0,)),
    *_rows("same", "one guarded row a sequence", "num_return_sequences"),
    *_rows("certified", "a lower cap stays valid", "max_new_tokens", "max_length"),
    *_moves("certified", "", min_new_tokens=(0,), min_length=(0,)),
    *_rows("shortens", "the tail waits for unseen tokens behind it", "max_time", "stop_strings"),
    *_rows(
        "shortens",
        "the tail waits for unseen tokens behind it; MaxLengthCriteria and EosTokenCriteria take "
        "the place of the cap and the end that were certified, and void",
        "stopping_criteria",
    ),
    *_rows("voids", "runs before the guard", "logits_processor", "prefix_allowed_tokens_fn"),
    *_moves("certified", "runs before the guard", repetition_penalty=(1.0,), bad_words_ids=()),
    *_moves("certified", "runs before the guard", no_repeat_ngram_size=(0,), sequence_bias=()),
    *_moves("certified", "runs before the guard", suppress_tokens=(), begin_suppress_tokens=()),
    *_moves("certified", "runs before the guard", forced_bos_token_id=(), forced_eos_token_id=()),
    *_moves("certified", "runs before the guard", exponential_decay_length_penalty=()),
    *_rows("same", "runs before the guard", "renormalize_logits"),
    *_rows("same", "each of its values by its own row", "generation_config"),
    *_rows("same", "", "input_ids", "inputs", "attention_mask", "tokenizer"),
    *_rows("same", "", "bos_token_id", "pad_token_id", "use_cache"),
    *_rows("certified", "", "eos_token_id"),
    *_rows("same", "always on outside decoder.installed()", "disable_compile"),
    *_moves(
        "voids",
        "judged when whole; a beam that trips gives way to one that does not",
        num_beams=(1,),
    ),
    *_rows("same", "of beams, which void", "early_stopping", "length_penalty"),
    *_rows(
        "same",
        "one prompt; judged when whole; the model itself accepts or rejects each token",
        "assistant_model",
        "assistant_tokenizer",
        "prompt_lookup_num_tokens",
    ),
    *_rows("same", "each option of the draft", "num_assistant_tokens", "max_matching_ngram_size"),
    *_rows("same", "each option of the draft", "num_assistant_tokens_schedule"),
    *_rows("same", "each option of the draft", "assistant_confidence_threshold"),
    *_rows("same", "each option of the draft", "assistant_lookbehind", "target_lookbehind"),
    Capability(
        "prefill_chunk_size",
        "supported",
        "same",
        "all chunks are heard",
        eager="a compiled graph keeps the newest chunk alone",
    ),
    *_rows(
        "voids",
        "cached parts of the open turn are judged again; an empty cache that rounds nothing stays "
        "valid, what a filled one was computed from is not seen",
        "past_key_values",
    ),
    *_rows("voids", "judged as a raw completion; not with rewind", "inputs_embeds"),
    *_rows("same", "steps recorded match what stands", "return_dict_in_generate", "output_scores"),
    *_rows("same", "steps recorded match what stands", "output_logits", "output_attentions"),
    *_rows("same", "steps recorded match what stands", "output_hidden_states"),
    *_rows("same", "one row; gets what may be shown, when it may be", "streamer"),
    *_rows("same", "", "max_cache_len"),
    *_rows("certified", "of quantized caches", "cache_config"),
    *_installed(
        "a compiled graph skips hooks that come with a call",
        "torch.compile",
        "compile_config",
    ),
    *_ignored("of encoder-decoder models", "decoder_start_token_id"),
    *_ignored("of contrastive search", "low_memory"),
    *_served(logit_bias=(), presence_penalty=(0.0,), frequency_penalty=(0.0,)),
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
    Capability(
        "cache_implementation",
        "refused",
        "certified",
        "paged caches drop custom processors in silence, and unknown ones may",
        "pass dynamic, static, offloaded, offloaded_static or quantized",
        # "hybrid" in a hub configuration is unset by generate itself.
        neutral=_CACHES,
        voiding=("quantized",),
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
        "it runs copies or parts of the model, which nobody reads",
        "wrap the model inside it (model.module), in each process its own",
        **dict.fromkeys(WRAPPERS, _NO),
    ),
    *_refused(
        "a rejected draft cannot be taken back out of a recurrent state",
        "generate without a draft, or use an attention model",
        recurrent_draft=_NO,
    ),
    *_refused(
        "a cache of recurrent states alone does not say what it was computed from",
        "pass the whole prompt without it",
        recurrent_cache=_NO,
    ),
    *_refused(
        "a tail, or an answer after a rewind, would be read without the picture or sound",
        "pass text alone",
        **dict.fromkeys(("pixel_values", "pixel_values_videos", "image_grid_thw"), ()),
        **dict.fromkeys(("video_grid_thw", "image_sizes", "input_features"), ()),
        **dict.fromkeys(("token_type_ids", "mm_token_type_ids"), ()),
    ),
    *_refused(
        "the forward would compute in another dtype than was certified",
        "generate outside of it; load the model in that dtype and make a bundle for it",
        **{"torch.autocast": _NO},
    ),
    *_refused(
        "all of the model is offloaded, so that it stands on no device its inputs could go to",
        "keep the embeddings on a device, with a device_map",
        **{"meta device": _NO},
    ),
    *_refused(
        "accelerate has put autocast into the forward, another dtype than was certified",
        "wrap accelerator.unwrap_model(model, keep_fp32_wrapper=False)",
        mixed_precision=_NO,
    ),
    *_refused(
        "padding after the prompt would be scored as text",
        "set tokenizer.padding_side='left' and pass the attention mask",
        right_padding=_NO,
    ),
)
