"""Recurrent states: what needs no crop is guarded, and what needs one is refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from benchmarks.families.check import readable
from benchmarks.families.tiny import tiny_config, tiny_model
from safe_decode.activations.architecture import anatomy_of
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.engines.transformers.loops.extra_forwards import positions_in
from safe_decode.errors import UnsupportedError
from safe_decode.testing.bundles import bundle_for, peaks, random_probe, threshold_between
from safe_decode.testing.models import D_MODEL, byte_tokenizer
from safe_decode.testing.models import tiny_model as plain_model
from tests.engines.test_capability_rows import no_forward
from tests.laws.test_laws import bare, same_row

PROMPTS = ["hello", "what is it?", "abc"]
CAP = 8
CLASSES = {
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "jamba": "JambaForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "rwkv": "RwkvForCausalLM",
    "marian": "MarianForCausalLM",
}
HYBRIDS = ("qwen3_next", "jamba", "lfm2")


def built(family):
    return tiny_model(tiny_config(family, CLASSES[family]), CLASSES[family])


def guarded(model, *, redirect="refuse", threshold=1e9, holdback=2):
    tokenizer = byte_tokenizer()
    probe = random_probe(sites=readable(anatomy_of(model)))
    bundle = bundle_for(model, tokenizer, threshold=threshold, holdback=holdback, probe=probe)
    return SafeDecoder(model, tokenizer, bundle, redirect=redirect)


def test_a_model_without_heads_is_read_at_its_residual_stream_alone():
    anatomy = anatomy_of(built("mamba"))
    assert (anatomy.n_heads, anatomy.head_dim, anatomy.n_kv_heads) == (0, 0, 0)
    assert anatomy.width(1, "resid") == D_MODEL
    with pytest.raises(UnsupportedError, match="MambaBlock has no attention heads.*resid site"):
        anatomy.module(1, "attn")


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": None}])
def test_drafts_are_refused_for_a_recurrent_state(options):
    model = built("qwen3_next")
    options = {name: value or plain_model() for name, value in options.items()}
    with no_forward(model), pytest.raises(UnsupportedError, match="rejected draft cannot be taken"):
        guarded(model).generate("hello", **options)


def test_a_cache_that_counts_no_positions_is_refused_and_one_that_does_is_not():
    recurrent, hybrid = built("mamba2"), built("qwen3_next")
    alone = DynamicCache(config=recurrent.config)
    assert positions_in(alone) is None
    with no_forward(recurrent), pytest.raises(UnsupportedError, match="does not say what it was"):
        guarded(recurrent).generate("hello", past_key_values=alone)
    mixed = DynamicCache(config=hybrid.config)
    assert positions_in(mixed) == 0
    output = guarded(hybrid).generate("hello", past_key_values=mixed, max_new_tokens=CAP)
    assert output.traces[0].end.error is None


@pytest.mark.parametrize("family", [*HYBRIDS, "mamba", "mamba2"])
@pytest.mark.parametrize("holdback", [0, 2])
def test_a_returned_cache_holds_what_bare_leaves_in_it_or_nothing(family, holdback):
    model, options = built(family), {"max_new_tokens": CAP, "return_dict_in_generate": True}
    theirs, _, _ = bare(model, byte_tokenizer(), PROMPTS[:1], **options)
    output = guarded(model, holdback=holdback).generate(PROMPTS[:1], **options)
    assert torch.equal(output.sequences, theirs.sequences)
    (trace,) = output.traces
    assert trace.end.error is None and trace.end.lookahead_tokens == holdback
    kept = output.generation.get("past_key_values") or output.generation.get("cache_params")
    if kept is None:
        return
    states = [layer for layer in kept.layers if getattr(layer, "recurrent_states", None)]
    filled = [
        bool(state.any())
        for layer in states
        for state in layer.recurrent_states.values()
        if state is not None
    ]
    if holdback and filled:
        assert not any(filled), "a state that has read unseen tokens outlives the call"
        assert positions_in(kept) in (None, 0)
    elif positions_in(kept) is not None:
        assert positions_in(kept) == positions_in(theirs.past_key_values)
    if not holdback and filled:
        assert all(filled)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_second_turn_on_a_cache_that_was_emptied_is_that_without_a_cache(family):
    model = built(family)
    decoder, cache = guarded(model), DynamicCache(config=model.config)
    first = torch.tensor([byte_tokenizer().encode("hello")])
    answer = decoder.generate(input_ids=first, past_key_values=cache, max_new_tokens=CAP)
    second = torch.cat([answer.sequences, first], -1)
    ours = decoder.generate(input_ids=second, past_key_values=cache, max_new_tokens=CAP)
    plain = decoder.generate(input_ids=second, max_new_tokens=CAP)
    assert torch.equal(ours.sequences, plain.sequences)
    assert [s.statistic for s in ours.traces[0].steps] == pytest.approx(
        [s.statistic for s in plain.traces[0].steps], abs=2e-2
    )


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_beams_of_recurrent_states_are_bare_where_nothing_trips(family):
    model, options = built(family), {"max_new_tokens": CAP, "num_beams": 2}
    theirs, _, _ = bare(model, byte_tokenizer(), PROMPTS, **options)
    calm = guarded(model).generate(PROMPTS, **options)
    assert torch.equal(calm.sequences, theirs)
    assert all(trace.end.error is None for trace in calm.traces)
    threshold = threshold_between(peaks(calm))
    output = guarded(model, threshold=threshold).generate(PROMPTS, **options)
    tripped = [trace.tripped for trace in output.traces]
    assert True in tripped
    for row, trace in enumerate(output.traces):
        assert (
            trace.tripped or trace.end.pruned_beams or same_row(output.sequences[row], theirs[row])
        )


def test_rows_that_would_read_padding_or_each_other_are_refused_by_name():
    marian, rwkv = built("marian"), built("rwkv")
    with no_forward(marian), pytest.raises(UnsupportedError, match="padding is refused for model_"):
        guarded(marian).generate(["hello", "go"], max_new_tokens=CAP)
    even = guarded(marian).generate(["hello", "world"], max_new_tokens=CAP)
    assert [trace.end.error for trace in even.traces] == [None, None]
    with no_forward(rwkv):
        with pytest.raises(UnsupportedError, match="batch of 2 rows is refused for model_type='rw"):
            guarded(rwkv).generate(["hello", "world"], max_new_tokens=CAP)
        with pytest.raises(UnsupportedError, match="batch of 3 rows is refused"):
            guarded(rwkv).generate("hello", num_return_sequences=3, do_sample=True)
    assert guarded(rwkv).generate("hello", max_new_tokens=CAP).traces[0].end.error is None


@pytest.mark.parametrize("family", ["marian", "rwkv"])
def test_the_server_does_not_take_families_whose_rows_it_could_not_join(family):
    with pytest.raises(UnsupportedError, match="is refused for model_type="):
        TransformersEngine(guarded(built(family)))
