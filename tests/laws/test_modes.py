"""Everything `generate` can do: laws 1, 2 and 4 for each mode, over families of models."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer

from safe_decode.engines.transformers.loops.whole_response import picked_beams, pruned_beams
from safe_decode.errors import UnsupportedError
from safe_decode.prompts.batch import from_prompts
from safe_decode.testing.bundles import REFUSAL, decoder_for, peaks, threshold_between
from safe_decode.testing.models import FAMILIES, MORE_FAMILIES, tiny_model
from tests.laws.test_failure_injection import At, drop_all_hooks, hooks_of
from tests.laws.test_laws import bare, same_row

PROMPTS = ["hello", "what is it?", "tell me a long story", "go", "abc"]
CAP = 24
EVERY_FAMILY = (*FAMILIES, *MORE_FAMILIES, "mixtral")

MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 40},
    "chunked": {"prefill_chunk_size": 5},
    "static": {"cache_implementation": "static"},
    "quantized": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "uncached": {"use_cache": False},
    "sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "outputs": {"return_dict_in_generate": True, "output_scores": True},
}
ALONE = {
    "assisted": {"assistant_model": None},
    "assisted sampling": {"assistant_model": None, "do_sample": True},
    "lookup": {"prompt_lookup_num_tokens": 3},
}
# `transformers` itself refuses these.
NOT_BARE = {("opt", "static"), ("falcon", "static")}


def check_laws(family, mode, tokenizer):
    model, options = tiny_model(family), {"max_new_tokens": CAP, **MODES[mode]}
    try:
        theirs, width, after = bare(model, tokenizer, PROMPTS, **options)
    except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
        pytest.skip(f"bare generate of {family} has no {mode}: {error}")
    theirs = getattr(theirs, "sequences", theirs)
    torch.manual_seed(0)
    flagged = decoder_for(model, tokenizer, redirect="flag").generate(PROMPTS, **options)
    assert torch.equal(torch.rand(3), after), "the global generator moved otherwise"
    assert torch.equal(flagged.sequences, theirs)
    for trace, ids in zip(flagged.traces, flagged.sequences[:, width:].tolist(), strict=True):
        # Law 4: one score for each content token, in its place.
        own = [step.token for step in trace.steps[1:]]
        assert own == ids[: len(own)] and trace.end.error is None
        assert [step.position for step in trace.steps] == list(range(len(own) + 1))
        assert trace.end.released_tokens == len(own) and trace.end.unscored_tail == 0
    torch.manual_seed(0)
    threshold = threshold_between(peaks(decoder_for(model, tokenizer).generate(PROMPTS, **options)))
    torch.manual_seed(0)
    output = decoder_for(model, tokenizer, redirect="rewind", threshold=threshold).generate(
        PROMPTS, **options
    )
    assert {trace.tripped for trace in output.traces} == {True, False}
    untouched = 0
    for row, trace in enumerate(output.traces):
        if not trace.tripped and not trace.end.pruned_beams:
            untouched += 1
            assert same_row(output.sequences[row], theirs[row])
    assert untouched and not hooks_of(model)


@pytest.mark.parametrize("mode", MODES)
def test_untripped_rows_are_bare_in_every_mode(tokenizer, mode):
    check_laws("llama", mode, tokenizer)


# Each family in one mode and each mode in some families; all pairs are in the slow test below.
# Beams of gemma end early here, so that what stands behind them shows.
A_CUT = [
    *zip(EVERY_FAMILY, itertools.cycle(MODES), strict=False),
    *itertools.product(["gemma3", "mistral_window", "mixtral", "gemma"], ["beams"]),
]


@pytest.mark.parametrize(("family", "mode"), sorted(set(A_CUT)))
def test_untripped_rows_are_bare_in_a_cut_through_modes_and_families(tokenizer, family, mode):
    check_laws(family, mode, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("mode", MODES)
def test_untripped_rows_are_bare_in_every_mode_and_family(tokenizer, family, mode):
    check_laws(family, mode, tokenizer)


def check_assisted(family, mode, tokenizer):
    model, options = tiny_model(family), {"max_new_tokens": CAP, **ALONE[mode]}
    if "assistant_model" in options:
        options["assistant_model"] = tiny_model("llama", seed=1)
    prompt = ["tell me a tale, a tale, a tale"]
    theirs, _, after = bare(model, tokenizer, prompt, **options)
    torch.manual_seed(0)
    flagged = decoder_for(model, tokenizer, redirect="flag").generate(prompt, **options)
    assert torch.equal(torch.rand(3), after) and torch.equal(flagged.sequences, theirs)
    trace = flagged.traces[0]
    assert [step.position for step in trace.steps] == list(range(len(trace.steps)))
    top = max(step.statistic for step in trace.steps)
    at = next(step.position for step in trace.steps if step.statistic == top)
    torch.manual_seed(0)
    output = decoder_for(model, tokenizer, redirect="refuse", threshold=top - 1e-3).generate(
        prompt, **options
    )
    end = output.traces[0].end
    assert end.trip_step == at and end.outcome == "refused"
    assert end.released_tokens == max(0, at - 1 - 2) and output.texts[0].endswith(REFUSAL)


@pytest.mark.parametrize("mode", ALONE)
def test_drafted_responses_are_judged_before_they_are_shown(tokenizer, mode):
    check_assisted("llama", mode, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("mode", ALONE)
def test_drafted_responses_are_judged_in_every_family(tokenizer, family, mode):
    check_assisted(family, mode, tokenizer)


def test_greedy_with_a_draft_has_the_scores_of_greedy(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="flag")
    plain = decoder.generate("go", max_new_tokens=CAP).traces[0]
    drafted = decoder.generate(
        "go", max_new_tokens=CAP, assistant_model=tiny_model("llama", seed=1)
    ).traces[0]
    assert [step.token for step in plain.steps] == [step.token for step in drafted.steps]
    for a, b in zip(plain.steps, drafted.steps, strict=True):
        assert a.statistic == pytest.approx(b.statistic, abs=2e-4)


# --- beams


def test_a_beam_that_trips_gives_way_to_the_next():
    assert picked_beams([False, True, False], [False] * 3, 1) == [0]
    assert picked_beams([True, False, False], [False] * 3, 1) == [1]
    assert picked_beams([True, True, False], [False] * 3, 2) == [0, 2]
    assert picked_beams([True, True, True], [False] * 3, 1) == [0]
    assert picked_beams([True, False, False], [False, True, False], 1) == [2]
    assert picked_beams([True, False], [False, True], 1) == [0], "nothing is no answer"
    assert pruned_beams([True, False, True], [1]) == 1
    assert pruned_beams([False, True], [0]) == 0


def test_a_pruned_beam_is_counted_and_the_item_stands(llama, tokenizer):
    options, prompts = {"max_new_tokens": 6, "num_beams": 4}, list("abcdefghijklmnop")
    flag = decoder_for(llama, tokenizer, redirect="flag")
    every = flag.generate(prompts, num_return_sequences=4, **options)
    tops = torch.tensor(peaks(every)).view(len(prompts), 4)
    row = next(i for i in range(len(prompts)) if tops[i, 0] > tops[i, 1:].min() + 0.02)
    threshold = float(tops[row, 0] + tops[row, 1:].min()) / 2
    output = decoder_for(llama, tokenizer, redirect="refuse", threshold=threshold).generate(
        prompts, **options
    )
    trace, second = output.traces[row], next(i for i in range(4) if tops[row, i] <= threshold)
    assert trace.end.pruned_beams == 1 and trace.end.outcome == "released"
    assert same_row(output.sequences[row], every.sequences[4 * row + second])


# --- prompts in parts


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_second_turn_may_reuse_the_cache_of_the_first(tokenizer, family):
    model = tiny_model(family)

    def turns(generate):
        cache = DynamicCache(config=model.config)
        first = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt"
        )
        first = first if isinstance(first, torch.Tensor) else first["input_ids"]
        answer = generate(input_ids=first, past_key_values=cache, max_new_tokens=12)
        more = tokenizer("<|end|><|user|>and?<|end|><|assistant|>", return_tensors="pt").input_ids
        second = torch.cat([answer, more], -1)
        length = cache.get_seq_length()
        return generate(input_ids=second, past_key_values=cache, max_new_tokens=12), length

    decoder, traces = decoder_for(model, tokenizer, redirect="flag"), []

    def guarded(**options):
        output = decoder.generate(**options)
        traces.append(output.traces[0])
        return output.sequences

    (theirs, n_theirs), (ours, n_ours) = turns(model.generate), turns(guarded)
    assert torch.equal(ours, theirs) and n_ours == n_theirs, "the cache is what bare leaves"
    again = decoder.generate(input_ids=ours[:, :-12], max_new_tokens=12).traces[0]
    assert [step.token for step in again.steps] == [step.token for step in traces[1].steps]
    for a, b in zip(again.steps, traces[1].steps, strict=True):
        assert a.statistic == pytest.approx(b.statistic, abs=2e-4)


def test_a_turn_continued_on_its_cache_is_judged_from_its_beginning(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="flag")
    whole = decoder.generate("go", max_new_tokens=12)
    ids = from_prompts(decoder.tokenizer, "go", None, decoder.device).input_ids
    cache = DynamicCache(config=llama.config)
    for _ in range(6):
        output = decoder.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2)
        ids = output.sequences
    assert torch.equal(ids, whole.sequences)
    for a, b in zip(output.traces[0].steps, whole.traces[0].steps, strict=True):
        assert a.token == b.token and a.statistic == pytest.approx(b.statistic, abs=2e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_trip_takes_the_users_cache_back_to_what_stands(llama, tokenizer, kind):
    make = {
        "dynamic": lambda: DynamicCache(config=llama.config),
        "static": lambda: StaticCache(config=llama.config, max_cache_len=200),
    }[kind]
    decoder = decoder_for(llama, tokenizer, redirect="refuse", threshold=-1e9)
    cache = make()
    decoder.generate("hello", past_key_values=cache, max_new_tokens=9)
    assert cache.get_seq_length() == 0
    free = decoder_for(llama, tokenizer)
    output = free.generate("what is it?", past_key_values=cache, max_new_tokens=9)
    assert output.texts == free.generate("what is it?", max_new_tokens=9).texts


def test_embeddings_are_judged_as_a_raw_completion(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="flag")
    ids = from_prompts(decoder.tokenizer, PROMPTS, None, decoder.device)
    given = {
        "inputs_embeds": llama.get_input_embeddings()(ids.input_ids).detach(),
        "attention_mask": ids.attention_mask,
    }
    theirs = llama.generate(**given, max_new_tokens=CAP)
    output = decoder.generate(**given, max_new_tokens=CAP)
    assert torch.equal(output.sequences, theirs)
    assert all("raw completion" in trace.header.certificate for trace in output.traces)
    threshold = threshold_between(peaks(output))
    output = decoder_for(llama, tokenizer, redirect="refuse", threshold=threshold).generate(
        **given, max_new_tokens=CAP
    )
    assert {trace.tripped for trace in output.traces} == {True, False}
    for row, trace in enumerate(output.traces):
        assert trace.tripped or same_row(output.sequences[row], theirs[row])
    with pytest.raises(UnsupportedError, match="rewind.*inputs_embeds"):
        decoder_for(llama, tokenizer).generate(**given)


# --- what is recorded


def test_recorded_steps_match_the_tokens_that_stand(llama, tokenizer):
    options = {
        "max_new_tokens": 60,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    theirs, width, _ = bare(llama, tokenizer, PROMPTS, **options)
    flagged = decoder_for(llama, tokenizer, redirect="flag").generate(PROMPTS, **options)
    threshold = threshold_between(peaks(flagged))
    output = decoder_for(llama, tokenizer, redirect="refuse", threshold=threshold).generate(
        PROMPTS, **options
    )
    recorded = output.generation
    assert torch.equal(recorded.sequences, output.sequences) and recorded.past_key_values is None
    assert {trace.tripped for trace in output.traces} == {True, False}
    for row, trace in enumerate(output.traces):
        kept = trace.end.released_tokens
        for step in range(min(len(recorded.scores), len(theirs.scores))):
            token = int(output.sequences[row, width + step])
            if not trace.tripped or step < kept:
                assert torch.equal(recorded.scores[step][row], theirs.scores[step][row])
                assert torch.equal(
                    recorded.hidden_states[step][-1][row], theirs.hidden_states[step][-1][row]
                )
            elif step < kept + len(REFUSAL):
                assert int(recorded.scores[step][row].argmax()) == token
                assert int(torch.isfinite(recorded.scores[step][row]).sum()) == 1
                assert recorded.logits[step][row].isnan().all()


def test_beams_record_which_beam_made_each_token(llama, tokenizer):
    options = {
        "max_new_tokens": CAP,
        "num_beams": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    theirs, _, _ = bare(llama, tokenizer, PROMPTS, **options)
    output = decoder_for(llama, tokenizer).generate(PROMPTS, **options)
    mine = llama.compute_transition_scores(
        output.generation.sequences, output.generation.scores, output.generation.beam_indices
    )
    wanted = llama.compute_transition_scores(theirs.sequences, theirs.scores, theirs.beam_indices)
    assert torch.equal(mine[:, : wanted.shape[1]], wanted)
    assert torch.equal(output.generation.sequences_scores, theirs.sequences_scores)


# --- streamers of transformers


@pytest.mark.parametrize("trips", [False, True])
def test_existing_streamer_code_works_unchanged(llama, tokenizer, trips):
    threshold = 1e9
    if trips:
        flagged = decoder_for(llama, tokenizer, redirect="flag").generate("go", max_new_tokens=30)
        threshold = peaks(flagged)[0] - 1e-3
    decoder = decoder_for(llama, tokenizer, redirect="refuse", threshold=threshold)
    whole = decoder.generate("go", max_new_tokens=30)
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60
    )
    thread = threading.Thread(
        target=decoder.generate, args=("go",), kwargs={"streamer": streamer, "max_new_tokens": 30}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == whole.texts[0] and whole.traces[0].tripped == trips


def test_a_streamer_is_ended_when_the_call_fails(llama, tokenizer):
    class Fails:
        def put(self, _value):
            self.n = getattr(self, "n", 0) + 1
            if self.n == 4:
                raise ZeroDivisionError("the consumer's own")

        def end(self):
            self.ended = True

    streamer = Fails()
    with pytest.raises(ZeroDivisionError):
        decoder_for(llama, tokenizer).generate("go", streamer=streamer, max_new_tokens=20)
    assert streamer.ended and not hooks_of(llama)
    with pytest.raises(UnsupportedError, match="streamer is refused for 2 rows"):
        decoder_for(llama, tokenizer).generate(["a", "b"], streamer=streamer)


# --- refused together, and closed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2, "seed": 1}, "seed is refused with beams"),
        ({"output_scores": True, "return_dict_in_generate": True, "seed": 1}, "output_scores"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding is refused for 2 prompts"),
        ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight=0.5"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(llama, tokenizer, options, words):
    with pytest.raises(UnsupportedError, match=words):
        decoder_for(llama, tokenizer).generate(["a", "b"], max_new_tokens=4, **options)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_a_hook_lost_while_beams_are_searched_closes_the_rows(llama, tokenizer, options):
    decoder = decoder_for(llama, tokenizer, redirect="rewind")
    vandal = At(4, lambda: drop_all_hooks(llama))
    output = decoder.generate(["hello"], max_new_tokens=12, logits_processor=[vandal], **options)
    end = output.traces[0].end
    assert end.outcome == "closed" and "BeatError" in end.error
    assert output.texts == [REFUSAL] and end.released_tokens == 0
