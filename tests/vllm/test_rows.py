"""What the guard leaves alone, what requests may ask for, and what is refused when one starts."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.engines.vllm.presence import require_guarded
from safe_decode.errors import UnsupportedError
from safe_decode.prompts.plain_text import text_ids
from safe_decode.testing.bundles import REFUSAL
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.vllm.engines import IS_V2, forked, refused, start
from tests.vllm.toys import N_NEW, SIGNALS, Toy, save_bundle

pytestmark = pytest.mark.vllm

# Triton's interpreter cannot run the kernel that keeps a share of the probability.
TOP_P = {} if IS_V2 else {"top_p": 0.5}

# The guard keeps two ids for itself; nobody else may choose them either.
WITHOUT_SIGNALS = {"logit_bias": dict.fromkeys(SIGNALS, -100.0), "max_tokens": N_NEW}


def facts_of(outputs: list) -> list[tuple]:
    said = [one.outputs[0] for one in outputs]
    return [(list(o.token_ids), o.finish_reason, o.stop_reason, o.text) for o in said]


def ask(llm, toy: Toy, **params: object) -> list[tuple]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(ids)} for ids in toy.prompts]
    own = [SamplingParams(**{**WITHOUT_SIGNALS, **params}, seed=i) for i in range(len(prompts))]
    return facts_of(llm.generate(prompts, own, use_tqdm=False))


def greedy_and_sampled(toy: Toy) -> list[list[tuple]]:
    # In one chunk: vLLM's first runner fails on a CPU where a seeded prompt comes in several.
    llm = start(toy, max_num_batched_tokens=1024)
    try:
        is_guarded = bool(require_guarded(llm))
    except UnsupportedError as error:
        assert "is not guarded: the plugin safe_decode was not loaded" in str(error)
        is_guarded = False
    assert is_guarded == bool(os.environ["SAFE_DECODE_BUNDLE"])
    return [ask(llm, toy, temperature=0.0), ask(llm, toy, temperature=1.0, **TOP_P)]


def test_rows_that_do_not_trip_are_the_bare_engines(llama_toy):
    bare = forked(greedy_and_sampled, llama_toy, SAFE_DECODE_BUNDLE="")
    guarded = forked(greedy_and_sampled, llama_toy, SAFE_DECODE_BUNDLE=str(llama_toy.bundle))
    flagged = forked(
        greedy_and_sampled,
        llama_toy,
        SAFE_DECODE_BUNDLE=str(llama_toy.bundle),
        SAFE_DECODE_REDIRECT="flag",
    )
    assert flagged == bare
    for ours, theirs in zip(guarded, bare, strict=True):
        tripped = [own[2] == "content_filter" for own in ours]
        assert 0 < sum(tripped) < len(tripped)
        for own, other, has_tripped in zip(ours, theirs, tripped, strict=True):
            if not has_tripped:
                assert own == other
                continue
            assert own[3].endswith(REFUSAL)
            n_kept = max(0, len(own[0]) - len(" ... " + REFUSAL))  # one id a byte
            assert own[0][:n_kept] == other[0][:n_kept]


def asked(toy: Toy) -> dict[str, object]:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    llm, told = start(toy, max_num_batched_tokens=1024), {}
    prompt = [{"prompt_token_ids": list(toy.prompts[0])}]
    for name, params in {
        "logprobs": {"logprobs": 1},
        "alpha": {"extra_args": {"safe_decode_alpha": 0.25}},
        "unknown": {"extra_args": {"safe_decode_threshold": 9.0}},
        "cap": {"extra_args": {"safe_decode_cap": 9}},
        "flag": {"extra_args": {"safe_decode_redirect": "flag"}},
    }.items():
        try:
            llm.generate(prompt, SamplingParams(**params), use_tqdm=False)
        except VLLMValidationError as error:
            told[name] = str(error)
    told["stopped"] = ask(llm, toy, temperature=0.0, extra_args={"safe_decode_redirect": "stop"})
    told["hindered"] = ask(
        llm,
        toy,
        temperature=2.0,
        **TOP_P,
        repetition_penalty=1.5,
        presence_penalty=2.0,
        frequency_penalty=2.0,
        ignore_eos=True,
        min_tokens=N_NEW,
        bad_words=["help"],
    )
    regex = StructuredOutputsParams(regex="[a-z]{5,200}")
    told["structured"] = ask(llm, toy, temperature=0.0, structured_outputs=regex)
    told["short"] = ask(llm, toy, temperature=0.0, max_tokens=1)
    long = [{"prompt_token_ids": [*toy.prompts[0]] * 5}]
    told["long"] = facts_of(
        llm.generate([{"prompt_token_ids": long[0]["prompt_token_ids"][-200:]}], use_tqdm=False)
    )
    return told


def test_a_request_tightens_the_guard_and_nothing_that_it_asks_for_loosens_it(llama_toy):
    told = forked(asked, llama_toy, SAFE_DECODE_BUNDLE=str(llama_toy.bundle))
    assert "logprobs=1 is refused under the guard" in told["logprobs"]
    assert "safe_decode_alpha=0.25 is not certified; pass one of [0.5]" in told["alpha"]
    for name in ("unknown", "cap"):
        assert "wanted some of safe_decode_alpha, safe_decode_redirect" in told[name]
    assert "safe_decode_redirect='flag' is not one of refuse, stop" in told["flag"]
    assert not any(REFUSAL in text for *_, text in told["stopped"])
    assert any(reason == "content_filter" for *_, reason, _ in told["stopped"])
    tripped = [one for one in told["hindered"] if one[2] == "content_filter"]
    assert tripped
    assert all(text.endswith(REFUSAL) for *_, text in tripped)
    assert {finish for _, finish, *_ in told["structured"]} <= {"stop", "length"}
    assert any(reason == "content_filter" for *_, reason, _ in told["structured"])
    assert not any(REFUSAL in text for *_, text in told["structured"])
    for ids, finish, reason, text in told["short"]:
        assert (finish, len(ids)) == ("length", 1) or text.endswith(REFUSAL), (ids, reason)
    ((ids, finish, _, text),) = told["long"]
    assert finish == "length" or text.endswith(REFUSAL) or finish == "stop"
    assert 200 + len(ids) <= 256


def starting(toy: Toy, **options: object) -> None:
    start(toy, **options)


def answering(toy: Toy) -> list[tuple]:
    return ask(start(toy), toy, temperature=0.0)


def test_an_engine_that_is_not_what_the_bundle_was_made_for_does_not_answer(llama_toy, tmp_path):
    other = dataclasses.replace(llama_toy, model=tmp_path / "other")
    tiny_model(
        "llama", seed=1, hidden_size=128, intermediate_size=192, vocab_size=272
    ).save_pretrained(other.model)
    byte_tokenizer().save_pretrained(other.model)
    named = {"SAFE_DECODE_BUNDLE": str(llama_toy.bundle)}
    assert "weights of" in refused(starting, other, **named)
    canary = ProbeBundle.load(llama_toy.bundle).canary
    moved = dataclasses.replace(canary, logits=canary.logits + torch.tensor(0.01))
    save_bundle(llama_toy, tmp_path / "moved", canary=moved)
    said = refused(answering, llama_toy, SAFE_DECODE_BUNDLE=str(tmp_path / "moved"))
    assert "the canary's scores differ by 0.01, wanted at most 0.001" in said
    gpt2 = dataclasses.replace(llama_toy, model=tmp_path / "gpt2")
    tiny_model("gpt2", n_embd=128, vocab_size=272).save_pretrained(gpt2.model)
    byte_tokenizer().save_pretrained(gpt2.model)
    said = refused(starting, gpt2, **named)
    assert "architecture=GPT2LMHeadModel is not guarded in vLLM" in said
    said = refused(starting_with_lora, llama_toy, **named)
    assert "lora_config=LoRAConfig is refused under the guard: adapters change" in said
    said = refused(starting, llama_toy, **named, SAFE_DECODE_REDIRECT="rewind")
    assert "SAFE_DECODE_REDIRECT=rewind is refused in vLLM" in said


def starting_with_lora(toy: Toy) -> None:
    start(toy, enable_lora=True)


def loosened(toy: Toy) -> list[list[tuple]]:
    llm = start(toy, max_num_batched_tokens=1024)
    before = ask(llm, toy, temperature=0.0)

    def loosen(model: torch.nn.Module) -> None:
        model.model.layers[0].mlp.down_proj._forward_pre_hooks.clear()

    llm.apply_model(loosen)
    return [before, ask(llm, toy, temperature=0.0)]


def test_rows_whose_activations_are_not_read_any_more_are_closed(llama_toy):
    before, after = forked(loosened, llama_toy, SAFE_DECODE_BUNDLE=str(llama_toy.bundle))
    # Texts of toys may begin within a character of the prompt; ids do not.
    refusal = list(text_ids(llama_toy.loaded()[1], REFUSAL))
    assert not all(ids == refusal for ids, *_ in before)
    assert all(ids == refusal for ids, *_ in after)
    assert {reason for *_, reason, _ in after} == {"content_filter"}
