"""Each row of the table of capabilities: supported ones are bare, refused ones run nothing."""

from __future__ import annotations

import contextlib
import inspect
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

import tests.activations.test_compiled
import tests.engines.test_decoder
import tests.engines.test_frames
import tests.laws.test_modes
from safe_decode.engines.transformers.capabilities import TABLE
from safe_decode.engines.transformers.capability_table import WRAPPERS
from safe_decode.errors import UnsupportedError
from safe_decode.prompts.batch import from_prompts
from safe_decode.testing.bundles import decoder_for, peaks, threshold_between
from safe_decode.testing.models import BOS, EOS, VOCAB_SIZE, byte_tokenizer, tiny_model
from tests.laws.test_failure_injection import hooks_of
from tests.laws.test_laws import same_row

PROMPTS = ["hello", "what is it?", "tell me a long story", "go", "abc"]
CAP = 16
SAMPLED = {"do_sample": True}
LOOKUP = {"prompt_lookup_num_tokens": 3}
BEAMS = {"num_beams": 3}
STATIC = {"cache_implementation": "static"}


class Forbids(LogitsProcessor):
    def __call__(self, _ids, scores):
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores


class EndsAt(StoppingCriteria):
    """Ends every row seven tokens after the first call."""

    def __init__(self):
        self.first = None

    def __call__(self, ids, _scores, **_):
        self.first = self.first or ids.shape[1]
        return torch.full((ids.shape[0],), ids.shape[1] >= self.first + 6, dtype=torch.bool)


@dataclass(frozen=True)
class Case:
    """One way of using a row of the table.

    Attributes:
        options: Of the call; a callable is called anew for each run.
        base: Options of both the call and the one it is compared with.
        moves: Whether the option changes what these models say.
        alone: One prompt, as assisted decoding wants it.
    """

    options: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    moves: bool = True
    alone: bool = False


def draft(options, *, moves=False):
    """An option of the draft changes which tokens are proposed, not which are chosen."""
    return Case(options, {"assistant_model": lambda: tiny_model(seed=1)}, moves=moves, alone=True)


def foreign_draft(options):
    """A draft whose vocabulary is not the model's."""
    other = byte_tokenizer()
    other.add_tokens(["hello"])
    return Case(
        {
            "assistant_model": lambda: tiny_model(seed=1, vocab_size=VOCAB_SIZE + 1),
            "assistant_tokenizer": lambda: other,
            "tokenizer": byte_tokenizer,
            **options,
        },
        moves=False,
        alone=True,
    )


SUPPORTED = {
    "do_sample": Case(SAMPLED),
    "temperature": Case({"temperature": 0.4}, SAMPLED),
    "top_k": Case({"top_k": 3}, SAMPLED),
    "top_p": Case({"top_p": 0.3}, SAMPLED),
    "min_p": Case({"min_p": 0.5}, SAMPLED),
    "top_h": Case({"top_h": 0.3}, SAMPLED),
    "typical_p": Case({"typical_p": 0.3}, SAMPLED),
    "epsilon_cutoff": Case({"epsilon_cutoff": 0.05}, SAMPLED),
    "eta_cutoff": Case({"eta_cutoff": 0.3}, SAMPLED),
    "num_return_sequences": Case({"num_return_sequences": 2}, SAMPLED),
    "max_new_tokens": Case({"max_new_tokens": 9}),
    "max_length": Case({"max_length": 45, "max_new_tokens": None}),
    "min_new_tokens": Case({"min_new_tokens": 12}, {"eos_token_id": list(range(60, 200))}),
    "min_length": Case({"min_length": 40}, {"eos_token_id": list(range(60, 200))}),
    "max_time": Case({"max_time": 1e-9}),
    "stop_strings": Case({"stop_strings": [chr(c) for c in range(97, 123)]}),
    "logits_processor": Case({"logits_processor": lambda: LogitsProcessorList([Forbids()])}),
    "prefix_allowed_tokens_fn": Case(
        {"prefix_allowed_tokens_fn": lambda: lambda _row, ids: list(range(50 + len(ids), 150))}
    ),
    "stopping_criteria": Case({"stopping_criteria": lambda: StoppingCriteriaList([EndsAt()])}),
    "repetition_penalty": Case({"repetition_penalty": 1.8}),
    "no_repeat_ngram_size": Case({"no_repeat_ngram_size": 1}),
    "bad_words_ids": Case({"bad_words_ids": [[i] for i in range(7, 140)]}),
    "sequence_bias": Case({"sequence_bias": [[[i], -9.0] for i in range(7, 140)]}),
    "suppress_tokens": Case({"suppress_tokens": list(range(7, 140))}),
    "begin_suppress_tokens": Case({"begin_suppress_tokens": list(range(7, 240))}),
    "forced_bos_token_id": Case(
        {"forced_bos_token_id": 99},
        {"input_ids": lambda: torch.tensor([[BOS], [70]]), "prompts": None},
    ),
    "forced_eos_token_id": Case({"forced_eos_token_id": EOS}),
    "renormalize_logits": Case({"renormalize_logits": True}, SAMPLED, moves=False),
    "exponential_decay_length_penalty": Case({"exponential_decay_length_penalty": (2, 4.0)}),
    "generation_config": Case(
        {"generation_config": lambda: GenerationConfig(repetition_penalty=1.8)}
    ),
    "bos_token_id": Case({"bos_token_id": 70}, moves=False),
    "eos_token_id": Case({"eos_token_id": list(range(60, 200))}),
    "pad_token_id": Case({"pad_token_id": 70}, {"eos_token_id": list(range(60, 160))}),
    "use_cache": Case({"use_cache": False}, moves=False),
    "disable_compile": Case({"disable_compile": True}, moves=False),
    "num_beams": Case(BEAMS),
    "early_stopping": Case(
        {"early_stopping": True}, {**BEAMS, "eos_token_id": list(range(60, 160))}
    ),
    "length_penalty": Case(
        {"length_penalty": 6.0}, {**BEAMS, "eos_token_id": list(range(60, 160))}
    ),
    "assistant_model": Case(
        {"assistant_model": lambda: tiny_model(seed=1)}, moves=False, alone=True
    ),
    "assistant_tokenizer": foreign_draft({}),
    "prompt_lookup_num_tokens": Case(LOOKUP, moves=False, alone=True),
    "num_assistant_tokens": draft({"num_assistant_tokens": 2}),
    "num_assistant_tokens_schedule": draft({"num_assistant_tokens_schedule": "constant"}),
    "assistant_confidence_threshold": draft({"assistant_confidence_threshold": 0.9}),
    "assistant_lookbehind": foreign_draft({"assistant_lookbehind": 4}),
    "target_lookbehind": foreign_draft({"target_lookbehind": 4}),
    "max_matching_ngram_size": Case(
        {"max_matching_ngram_size": 1}, LOOKUP, moves=False, alone=True
    ),
    "prefill_chunk_size": Case({"prefill_chunk_size": 4}, moves=False),
    "return_dict_in_generate": Case({"return_dict_in_generate": True}, moves=False),
    "output_scores": Case({"output_scores": True}, {"return_dict_in_generate": True}, moves=False),
    "output_logits": Case({"output_logits": True}, {"return_dict_in_generate": True}, moves=False),
    "output_hidden_states": Case(
        {"output_hidden_states": True}, {"return_dict_in_generate": True}, moves=False
    ),
    "output_attentions": Case(
        {"output_attentions": True},
        {"return_dict_in_generate": True, "eager": True},
        moves=False,
    ),
    "max_cache_len": Case({"max_cache_len": 90}, STATIC, moves=False),
    "cache_config": Case(
        {"cache_config": {"backend": "fp8"}, "cache_implementation": "quantized"}, moves=False
    ),
    "past_key_values": Case({"past_key_values": DynamicCache}, moves=False),
    "tokenizer": Case({"tokenizer": byte_tokenizer}, moves=False),
    "decoder_start_token_id": Case({"decoder_start_token_id": 5}, moves=False),
    "low_memory": Case({"low_memory": True}, moves=False),
}
NAMED = {
    "input_ids": tests.laws.test_modes.test_a_second_turn_may_reuse_the_cache_of_the_first,
    "inputs": tests.engines.test_decoder.test_ids_give_what_prompts_give,
    "attention_mask": tests.laws.test_modes.test_embeddings_are_judged_as_a_raw_completion,
    "inputs_embeds": tests.laws.test_modes.test_embeddings_are_judged_as_a_raw_completion,
    "streamer": tests.laws.test_modes.test_existing_streamer_code_works_unchanged,
}
"""Rows whose test is a function of its own, which names the row."""

REFUSED = {
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": [object()],
    "force_words_ids": [[1]],
    "assistant_early_exit": 2,
    "assistant_ensemble_weight": 0.5,
    "is_assistant": True,
    "speculation_type": "eagle",
    "use_mtp": True,
    "cache_implementation": "paged",
    "guidance_scale": 1.5,
    "negative_prompt_ids": torch.tensor([[1]]),
    "negative_prompt_attention_mask": torch.tensor([[1]]),
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "custom_generate": lambda: None,
    "trust_remote_code": True,
    "continuous_batching_config": object(),
    "compile_config": object(),
    "position_ids": torch.zeros(1, 1),
    "token_healing": True,
    "remove_invalid_values": True,
    "watermarking_config": object(),
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "synced_gpus": True,
    "pixel_values": torch.zeros(1, 3, 8, 8),
    "pixel_values_videos": torch.zeros(1, 3, 8, 8),
    "image_grid_thw": torch.ones(1, 3),
    "video_grid_thw": torch.ones(1, 3),
    "image_sizes": torch.ones(1, 2),
    "input_features": torch.zeros(1, 4, 8),
    "token_type_ids": torch.zeros(1, 4),
    "mm_token_type_ids": torch.zeros(1, 4),
}


def made(options):
    return {key: value() if callable(value) else value for key, value in options.items()}


def given(case, model, tokenizer, options):
    """Options as the two calls get them: with prompts for ours, with ids for the bare one."""
    call = {"max_new_tokens": CAP, **made(case.base), **made(options)}
    call = {key: value for key, value in call.items() if key != "eager"}
    prompts = PROMPTS[2:3] if case.alone else PROMPTS
    if "input_ids" in call:
        ids = call.pop("input_ids")
        call.pop("prompts")
        return {"input_ids": ids}, {"input_ids": ids}, call
    inputs = from_prompts(tokenizer, prompts, None, model.device)
    bare = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    return {"prompts": prompts}, bare, call


def run_bare(case, model, tokenizer, options):
    _, inputs, call = given(case, model, tokenizer, options)
    extra = {"tokenizer": tokenizer} if "stop_strings" in call else {}
    torch.manual_seed(0)
    found = model.generate(**inputs, **call, **extra)
    return getattr(found, "sequences", found)


def run_guarded(case, model, tokenizer, **how):
    prompts, _, call = given(case, model, tokenizer, case.options)
    torch.manual_seed(0)
    return decoder_for(model, tokenizer, **how).generate(**prompts, **call)


FORCES_ENDS = ("forced_eos_token_id", "exponential_decay_length_penalty")


@pytest.mark.parametrize("feature", SUPPORTED)
def test_each_supported_option_is_bare_where_nothing_trips(tokenizer, feature):
    case = SUPPORTED[feature]
    eager = {"attn_implementation": "eager"} if case.base.get("eager") else {}
    model = tiny_model(**eager)
    theirs = run_bare(case, model, tokenizer, case.options)
    before = len(hooks_of(model))  # transformers keeps some of its own once it captured
    if case.moves:
        without = run_bare(case, model, tokenizer, {})
        assert not torch.equal(theirs, without), f"{feature} does nothing here, so shows nothing"
    flagged = run_guarded(case, model, tokenizer, redirect="flag")
    assert torch.equal(flagged.sequences, theirs)
    assert all(trace.end.error is None for trace in flagged.traces)
    tops = peaks(run_guarded(case, model, tokenizer, redirect="refuse"))
    threshold = tops[0] - 1e-3 if case.alone else threshold_between(tops)
    output = run_guarded(case, model, tokenizer, redirect="refuse", threshold=threshold)
    tripped = [trace.tripped for trace in output.traces]
    assert True in tripped and (case.alone or False in tripped)
    for row, trace in enumerate(output.traces):
        assert trace.end.error is None
        # The end that such an option brings about is not the model's own.
        assert not trace.end.withheld_tokens or feature in FORCES_ENDS
        if not trace.tripped and not trace.end.pruned_beams and not trace.end.withheld_tokens:
            assert same_row(output.sequences[row], theirs[row])
    assert len(hooks_of(model)) == before


@pytest.mark.parametrize("feature", REFUSED)
def test_each_refused_option_runs_nothing_and_says_why_and_what_instead(llama, tokenizer, feature):
    row = {row.feature: row for row in TABLE}[feature]
    with no_forward(llama), pytest.raises(UnsupportedError) as caught:
        decoder_for(llama, tokenizer).generate("hello", **{feature: REFUSED[feature]})
    said = str(caught.value)
    assert feature in said and row.reason in said and row.instead in said


@contextlib.contextmanager
def no_forward(model):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    yield
    handle.remove()
    assert not calls


# --- models and calls that are refused, whatever the options


def refused_states(llama, tokenizer):
    encoder = tiny_model()
    encoder.config.is_encoder_decoder = True
    stateful = tiny_model()
    type_of = type(stateful)
    stateful.__class__ = type("Stateful", (type_of,), {"_is_stateful": True})
    recurrent = decoder_for(stateful, tokenizer)
    padded = torch.tensor([[BOS, 70, 71, 0], [BOS, 72, 73, 74]])
    decoder = decoder_for(llama, tokenizer)
    return {
        "is_encoder_decoder": (encoder, lambda: decoder_for(encoder, tokenizer)),
        "recurrent_draft": (
            stateful,
            lambda: recurrent.generate("hello", prompt_lookup_num_tokens=3),
        ),
        "recurrent_cache": (
            llama,
            lambda: decoder.generate("hello", past_key_values=recurrent_cache()),
        ),
        "training": (llama, lambda: decoder_for(llama.train(), tokenizer)),
        "torch.autocast": (llama, lambda: under_autocast(decoder)),
        "right_padding": (
            llama,
            lambda: decoder.generate(
                input_ids=padded, attention_mask=(padded != 0).long(), max_new_tokens=2
            ),
        ),
        "cache_offloading": (
            llama,
            lambda: decoder.generate("hello", cache_implementation="offloaded_static"),
        ),
        **{
            name: (llama, partial(decoder.generate, "hello", **{name: value}))
            for name, value in SERVED.items()
        },
    }


def recurrent_cache():
    """A cache of recurrent states alone, as those of state-space models are."""
    return DynamicCache(config=MambaConfig(num_hidden_layers=2))


SERVED = {
    "logit_bias": {70: 1.0},
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "ignore_eos": True,
    "chat_template_kwargs": {"enable_thinking": False},
}


def under_autocast(decoder):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoder.generate("hello", max_new_tokens=2)


STATES = (
    "is_encoder_decoder",
    "recurrent_draft",
    "recurrent_cache",
    "training",
    "torch.autocast",
    "right_padding",
    "cache_offloading",
    *SERVED,
)


@pytest.mark.parametrize("feature", STATES)
def test_each_refused_state_runs_nothing_and_says_why_and_what_instead(llama, tokenizer, feature):
    row = {row.feature: row for row in TABLE}[feature]
    model, act = refused_states(llama, tokenizer)[feature]
    with no_forward(model), pytest.raises(UnsupportedError) as caught:
        act()
    said = str(caught.value)
    assert row.reason in said and row.instead in said


# --- caches that live elsewhere


class _Stream:
    """Stands for an accelerator's stream where there is none: everything is in order anyway."""

    def wait_stream(self, _other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_offloaded_caches_are_heard(tokenizer, monkeypatch, kind, family):
    model = tiny_model(family)
    monkeypatch.setattr(
        "safe_decode.engines.transformers.capabilities._is_on_cuda", lambda _model: True
    )
    monkeypatch.setattr(torch, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _device: _Stream())
    moved = []
    monkeypatch.setattr(
        "transformers.cache_utils.CacheLayerMixin.offload", lambda self: moved.append(self)
    )
    case = Case({"cache_implementation": kind}, moves=False)
    check_offloaded(case, model, tokenizer)
    assert moved


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_are_heard_on_cuda(tokenizer, kind):
    case = Case({"cache_implementation": kind}, moves=False)
    check_offloaded(case, tiny_model().cuda(), tokenizer)


def check_offloaded(case, model, tokenizer):
    theirs = run_bare(case, model, tokenizer, case.options)
    flagged = run_guarded(case, model, tokenizer, redirect="flag")
    assert torch.equal(flagged.sequences, theirs)
    plain = run_guarded(Case({}), model, tokenizer, redirect="flag")
    for ours, own in zip(flagged.traces, plain.traces, strict=True):
        assert [s.statistic for s in ours.steps] == pytest.approx(
            [s.statistic for s in own.steps], abs=2e-4
        )
    threshold = threshold_between(peaks(flagged))
    output = run_guarded(case, model, tokenizer, redirect="rewind", threshold=threshold)
    assert {trace.tripped for trace in output.traces} == {True, False}
    for row, trace in enumerate(output.traces):
        assert trace.end.error is None
        assert trace.tripped or same_row(output.sequences[row], theirs[row])


# --- the table and its tests


def test_every_row_of_the_table_has_a_test_that_names_it():
    rows = {
        status: {row.feature for row in TABLE if row.status == status}
        for status in ("supported", "ignored", "refused", "installed", "served")
    }
    assert rows["supported"] | rows["ignored"] == set(SUPPORTED) | set(NAMED)
    # What is read inside decoder.installed() is refused outside.
    refused = rows["refused"] | rows["installed"] | rows["served"]
    framed = {*WRAPPERS, "meta device", "mixed_precision"}
    assert refused == set(REFUSED) | set(STATES) | {"torch.compile"} | framed
    in_frames = inspect.getsource(tests.engines.test_frames)
    assert all(re.search(rf"\b{feature}\b", in_frames) for feature in framed)
    refused_outside = inspect.getsource(
        tests.activations.test_compiled.test_hooks_of_a_call_on_a_compiled_model_are_refused_by_name
    )
    assert "torch.compile" in refused_outside
    for feature, case in SUPPORTED.items():
        assert feature in case.options
    for feature, test in NAMED.items():
        assert re.search(rf"\b{feature}\b", inspect.getsource(test)), f"{test} misses {feature}"
