"""The table: what `generate` can do, whether it is guarded, and what it does to a certificate.

Knows option names, their values that use nothing, and reasons as users read them. Does not know
calls or configurations; those are checked by `capabilities`, and against certificates by
`coverage`.
"""

from __future__ import annotations

from safe_decode.engines.transformers.capability import (
    Capability,
    ignored,
    installed,
    moves,
    refused,
    rows,
    served,
)

__all__ = ["TABLE", "WRAPPERS"]

_NO: tuple[object, ...] = (False,)
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
"""Classes that run a model in copies or parts, by name."""
_PICTURES = (
    "pixel_values",
    "pixel_values_videos",
    "image_grid_thw",
    "video_grid_thw",
    "image_sizes",
    "input_features",
    "token_type_ids",
    "mm_token_type_ids",
)
_CACHES = ("dynamic", "hybrid", "static", "offloaded", "offloaded_static", "quantized")

TABLE: tuple[Capability, ...] = (
    *rows("certified", "greedy and multinomial sampling", "do_sample"),
    *rows("sampled", "", "temperature", "top_k", "top_p", "top_h"),
    *moves("sampled", "", min_p=(0.0,), typical_p=(1.0,), epsilon_cutoff=(0.0,)),
    *moves("sampled", "", eta_cutoff=(0.0,)),
    *rows("same", "one guarded row a sequence", "num_return_sequences"),
    *rows("certified", "a lower cap stays valid", "max_new_tokens", "max_length"),
    *moves("certified", "", min_new_tokens=(0,), min_length=(0,)),
    *rows("shortens", "the tail waits for unseen tokens behind it", "max_time", "stop_strings"),
    *rows(
        "shortens",
        "the tail waits for unseen tokens behind it; MaxLengthCriteria and EosTokenCriteria take "
        "the place of the cap and the end that were certified, and void",
        "stopping_criteria",
    ),
    *rows("voids", "runs before the guard", "logits_processor", "prefix_allowed_tokens_fn"),
    *moves("certified", "runs before the guard", repetition_penalty=(1.0,), bad_words_ids=()),
    *moves("certified", "runs before the guard", no_repeat_ngram_size=(0,), sequence_bias=()),
    *moves("certified", "runs before the guard", suppress_tokens=(), begin_suppress_tokens=()),
    *moves("certified", "runs before the guard", forced_bos_token_id=(), forced_eos_token_id=()),
    *moves("certified", "runs before the guard", exponential_decay_length_penalty=()),
    *rows("same", "runs before the guard", "renormalize_logits"),
    *rows("same", "each of its values by its own row", "generation_config"),
    *rows("same", "", "input_ids", "inputs", "attention_mask", "tokenizer"),
    *rows("same", "", "bos_token_id", "pad_token_id", "use_cache"),
    *rows("certified", "", "eos_token_id"),
    *rows("same", "always on outside decoder.installed()", "disable_compile"),
    *moves(
        "voids",
        "judged when whole; a beam that trips gives way to one that does not",
        num_beams=(1,),
    ),
    *rows("same", "of beams, which void", "early_stopping", "length_penalty"),
    *rows(
        "same",
        "one prompt; judged when whole; the model itself accepts or rejects each token",
        "assistant_model",
        "assistant_tokenizer",
        "prompt_lookup_num_tokens",
    ),
    *rows("same", "each option of the draft", "num_assistant_tokens", "max_matching_ngram_size"),
    *rows("same", "each option of the draft", "num_assistant_tokens_schedule"),
    *rows("same", "each option of the draft", "assistant_confidence_threshold"),
    *rows("same", "each option of the draft", "assistant_lookbehind", "target_lookbehind"),
    Capability(
        "prefill_chunk_size",
        "supported",
        "same",
        "all chunks are heard",
        eager="a compiled graph keeps the newest chunk alone",
    ),
    *rows(
        "voids",
        "cached parts of the open turn are judged again; an empty cache that rounds nothing stays "
        "valid, what a filled one was computed from is not seen",
        "past_key_values",
    ),
    *rows("voids", "judged as a raw completion; not with rewind", "inputs_embeds"),
    *rows("same", "steps recorded match what stands", "return_dict_in_generate", "output_scores"),
    *rows("same", "steps recorded match what stands", "output_logits", "output_attentions"),
    *rows("same", "steps recorded match what stands", "output_hidden_states"),
    *rows("same", "one row; gets what may be shown, when it may be", "streamer"),
    *rows("same", "", "max_cache_len"),
    *rows("certified", "of quantized caches", "cache_config"),
    *installed(
        "a compiled graph skips hooks that come with a call",
        "torch.compile",
        "compile_config",
    ),
    *ignored("of encoder-decoder models", "decoder_start_token_id"),
    *ignored("of contrastive search", "low_memory"),
    *served(
        "pass sequence_bias or repetition_penalty to generate",
        logit_bias=(),
        presence_penalty=(0.0,),
        frequency_penalty=(0.0,),
    ),
    *served("pass min_new_tokens to generate", ignore_eos=_NO),
    *served("render the prompt and pass input_ids to generate", chat_template_kwargs=()),
    *refused(
        "transformers runs it in a foreign loop, which may call neither hooks nor processors",
        "pass num_beams alone",
        num_beam_groups=(1,),
        diversity_penalty=(0.0,),
        constraints=(),
        force_words_ids=(),
    ),
    *refused(
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
    *refused(
        "offloaded caches move layers over CUDA streams, and the model is not on CUDA",
        "move the model to CUDA, or pass dynamic, static or quantized as cache_implementation",
        cache_offloading=_NO,
    ),
    *refused(
        "a second forward runs between the guard's score and the choice",
        "generate without guidance",
        guidance_scale=(1, 1.0),
        negative_prompt_ids=(),
        negative_prompt_attention_mask=(),
    ),
    *refused(
        "contrastive search and DoLa run loops of their own",
        "use greedy or sampled generation",
        penalty_alpha=(0, 0.0),
        dola_layers=(),
    ),
    *refused(
        "a foreign loop may call neither hooks nor processors",
        "use greedy or sampled generation",
        custom_generate=(),
        trust_remote_code=_NO,
    ),
    *refused(
        "paged and continuous batching drop custom processors in silence",
        "call generate on one batch",
        continuous_batching_config=(),
    ),
    *refused(
        "positions cannot be matched to tokens",
        "pass prompts, input_ids or inputs_embeds with their attention mask",
        position_ids=(),
        token_healing=_NO,
    ),
    *refused(
        "NaN would be hidden from the guard",
        "leave remove_invalid_values off; a row with NaN is redirected",
        remove_invalid_values=_NO,
    ),
    *refused(
        "redirected text would carry no watermark",
        "generate without watermarking_config",
        watermarking_config=(),
    ),
    *refused(
        "the penalty is meant for encoder inputs",
        "pass repetition_penalty or no_repeat_ngram_size",
        encoder_repetition_penalty=(1.0,),
        encoder_no_repeat_ngram_size=(0,),
    ),
    *refused("waits across devices are not tested", "run on one device", synced_gpus=_NO),
    *refused(
        "the assistant turn is not one open sequence",
        "use a decoder-only model",
        is_encoder_decoder=_NO,
    ),
    *refused(
        "dropout draws random numbers and makes scores noise",
        "call model.eval() first",
        training=_NO,
    ),
    *refused(
        "it runs copies or parts of the model, which nobody reads",
        "wrap the model inside it (model.module), in each process its own",
        **dict.fromkeys(WRAPPERS, _NO),
    ),
    *refused(
        "a rejected draft cannot be taken back out of a recurrent state",
        "generate without a draft, or use an attention model",
        recurrent_draft=_NO,
    ),
    *refused(
        "a cache of recurrent states alone does not say what it was computed from",
        "pass the whole prompt without it",
        recurrent_cache=_NO,
    ),
    *refused(
        "a tail, or an answer after a rewind, would be read without the picture or sound",
        "pass text alone",
        **dict.fromkeys(_PICTURES, ()),
    ),
    *refused(
        "the forward would compute in another dtype than was certified",
        "generate outside of it; load the model in that dtype and make a bundle for it",
        **{"torch.autocast": _NO},
    ),
    *refused(
        "all of the model is offloaded, so that it stands on no device its inputs could go to",
        "keep the embeddings on a device, with a device_map",
        **{"meta device": _NO},
    ),
    *refused(
        "accelerate has put autocast into the forward, another dtype than was certified",
        "wrap accelerator.unwrap_model(model, keep_fp32_wrapper=False)",
        mixed_precision=_NO,
    ),
    *refused(
        "padding after the prompt would be scored as text",
        "set tokenizer.padding_side='left' and pass the attention mask",
        right_padding=_NO,
    ),
)
