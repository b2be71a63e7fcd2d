"""What users pass and what they get back."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from safe_decode.certificate import Certificate
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import (
    CertificateError,
    ConfigurationError,
    PromptError,
    UnsupportedError,
)
from safe_decode.policy.policy import RequestPolicy
from safe_decode.prompts.batch import RAW_WINDOW_TOKENS, from_ids, from_prompts
from safe_decode.testing.bundles import REFUSAL, bundle_for, decoder_for, random_probe
from safe_decode.testing.models import CONTEXT, PAD, byte_tokenizer, tiny_model


def test_prompts_may_be_a_string_strings_a_conversation_or_conversations(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer)
    chat = [{"role": "user", "content": "hello"}]
    texts = [
        decoder.generate(prompts, max_new_tokens=5).texts
        for prompts in ("hello", ["hello"], chat, [chat])
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3] and len(texts[0]) == 1


def test_ids_give_what_prompts_give(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="flag")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    a = decoder.generate("hello", max_new_tokens=5)
    b = decoder.generate(input_ids=ids, max_new_tokens=5)
    assert torch.equal(a.sequences, b.sequences)
    assert list(a.traces) == list(b.traces)
    assert list(decoder.generate(inputs=ids, max_new_tokens=5).traces) == list(a.traces)


def test_a_prefill_inside_raw_ids_is_scanned_as_well(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="flag")
    a = decoder.generate("hello", prefill="Sure, here", max_new_tokens=5)
    b = decoder.generate(input_ids=a.sequences[:, :-5], max_new_tokens=5)
    assert b.traces[0].end.prefill_tokens == len("Sure, here")
    assert list(a.traces) == list(b.traces)


def test_the_text_leaves_prompt_and_prefill_out(llama, tokenizer):
    output = decoder_for(llama, tokenizer, redirect="refuse", threshold=-1e9).generate(
        "hello", prefill="Sure", max_new_tokens=5
    )
    assert output.texts == [REFUSAL]
    assert tokenizer.decode(output.sequences[0], skip_special_tokens=True) == "helloSure" + REFUSAL


def test_a_raw_completion_scans_a_window_and_voids_the_certificate(llama, tokenizer):
    ids = torch.randint(10, 200, (1, RAW_WINDOW_TOKENS + 20))
    trace = (
        decoder_for(llama, tokenizer, redirect="flag")
        .generate(input_ids=ids, max_new_tokens=2)
        .traces[0]
    )
    assert sum(step.action == "scan" for step in trace.steps) == RAW_WINDOW_TOKENS
    assert trace.header.certificate.startswith("void(a raw completion")
    assert [step.token for step in trace.steps][:3] == ids[0, 20:23].tolist()


def test_generating_one_token_a_call_is_no_way_around(llama, tokenizer):
    flag = decoder_for(llama, tokenizer, redirect="flag")
    whole = flag.generate("go", max_new_tokens=20)
    values = [step.statistic for step in whole.traces[0].steps]
    threshold = max(values) - 1e-3
    decoder = decoder_for(llama, tokenizer, redirect="refuse", threshold=threshold)
    ids, tripped_at = from_prompts(decoder.tokenizer, "go", None, decoder.device).input_ids, None
    for step in range(25):
        output = decoder.generate(input_ids=ids, max_new_tokens=1)
        if output.traces[0].tripped:
            tripped_at = step
            break
        ids = output.sequences
    # Each call judges its one token and the two unseen ones of the hold-back behind it.
    assert tripped_at == whole.traces[0].steps[values.index(max(values))].position - 1 - 2


BAD_CALLS = {
    "empty prompt": (lambda d: d.generate(""), PromptError, "empty"),
    "no prompts": (lambda d: d.generate([]), PromptError, "at least one"),
    "nothing": (lambda d: d.generate(), PromptError, "exactly one"),
    "both": (
        lambda d: d.generate("a", input_ids=torch.ones(1, 1)),
        PromptError,
        "exactly one",
    ),
    "too long": (lambda d: d.generate("x" * CONTEXT), PromptError, str(CONTEXT)),
    "beams": (lambda d: d.stream("a", num_beams=4), UnsupportedError, "stream is refused"),
    "prefills": (
        lambda d: d.generate(["a", "b"], prefill=["c"]),
        ConfigurationError,
        "1 entries for 2 prompts",
    ),
    "prefill with ids": (
        lambda d: d.generate(input_ids=torch.ones(1, 1).long(), prefill="c"),
        ConfigurationError,
        "prefill goes with prompts",
    ),
    "redirect": (lambda d: d.generate("a", redirect="shout"), ConfigurationError, "shout"),
    "right padding": (
        lambda d: d.generate(input_ids=torch.tensor([[7, 8, PAD]])),
        UnsupportedError,
        "right_padding",
    ),
    "all padding": (
        lambda d: d.generate(input_ids=torch.tensor([[PAD, PAD]])),
        PromptError,
        "all padding",
    ),
    "mask": (
        lambda d: d.generate(input_ids=torch.ones(1, 3).long(), attention_mask=torch.ones(1, 2)),
        PromptError,
        "attention_mask",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_meets_a_clear_error(llama, tokenizer, case):
    call, error, words = BAD_CALLS[case]
    with pytest.raises(error, match=words):
        call(decoder_for(llama, tokenizer))


def test_a_tokenizer_without_a_chat_template_is_a_clear_error(llama):
    tokenizer = byte_tokenizer(chat_template=None)
    with pytest.raises(PromptError, match="chat template"):
        decoder_for(llama, tokenizer).generate("hello")


def test_bad_settings_are_refused_at_construction(llama, tokenizer):
    for options, error in (
        ({"refusal": " "}, ConfigurationError),
        ({"opener": ""}, ConfigurationError),
        ({"redirect": "shout"}, ConfigurationError),
        ({"holdback_tokens": -1}, ConfigurationError),
        ({"on_error": "ignore"}, ConfigurationError),
        ({"alpha": 0.123}, CertificateError),
        ({"population": "nobody"}, CertificateError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            decoder_for(llama, tokenizer, **options)


def test_an_unknown_layer_is_refused_at_construction(llama, tokenizer):
    probe = random_probe()
    site = dataclasses.replace(probe.sites[2], layer=40)
    far = dataclasses.replace(probe, sites=(*probe.sites[:2], site))
    bundle = bundle_for(llama, tokenizer, probe=far)
    with pytest.raises(ConfigurationError, match="layer=40 is outside"):
        SafeDecoder(llama, tokenizer, bundle)


def test_texts_of_the_decoder_replace_those_of_the_bundle(llama, tokenizer):
    decoder = decoder_for(
        llama, tokenizer, redirect="refuse", threshold=-1e9, refusal="No, thank you."
    )
    assert decoder.generate("hello", max_new_tokens=5).texts == ["No, thank you."]


def test_a_trip_is_parked_and_shorter_rows_are_padded(llama, tokenizer):
    output = decoder_for(llama, tokenizer, redirect="stop", threshold=-1e9).generate(
        ["hello", "go"], max_new_tokens=5
    )
    assert output.texts == ["", ""]
    assert [trace.end.outcome for trace in output.traces] == ["stopped", "stopped"]


def test_scores_need_an_assistants_last_message(llama, tokenizer):
    with pytest.raises(PromptError, match="assistant"):
        decoder_for(llama, tokenizer).score([[{"role": "user", "content": "x"}]])


def test_rows_of_ids_are_scanned_by_their_own_length():
    tokenizer = byte_tokenizer()
    rows = [[0, 0, 1, 4, 70, 6, 5], [1, 4, 70, 6, 5, 80, 81]]
    inputs = from_ids(tokenizer, torch.tensor(rows), None)
    assert inputs.scanned == (1, 3) and inputs.prefill_tokens == (0, 2)
    assert inputs.repeated(2).scanned == (1, 1, 3, 3)
    assert inputs.repeated(2).prompt_ids(1) == rows[0][2:]


def test_models_in_training_mode_are_refused(tokenizer):
    model = tiny_model("llama")
    decoder = decoder_for(model, tokenizer)
    model.train()
    with pytest.raises(UnsupportedError, match="training"):
        decoder.generate("hello", max_new_tokens=2)


def with_populations(llama, tokenizer, **thresholds):
    bundle = bundle_for(llama, tokenizer)
    (one,) = bundle.certificates
    certificates = [
        Certificate.compute(
            [threshold] * 20,
            alpha=alpha,
            delta=one.delta,
            population=population,
            envelope=one.envelope,
        )
        for population, threshold in thresholds.items()
        for alpha in (0.5, 0.6)
    ]
    return dataclasses.replace(bundle, certificates=tuple(certificates))


def test_the_threshold_is_that_of_the_population_that_is_served(llama, tokenizer):
    bundle = with_populations(llama, tokenizer, benign=-1e9, begun=1e9)
    trips = {}
    for population in ("benign", "begun"):
        decoder = SafeDecoder(llama, tokenizer, bundle, redirect="refuse", population=population)
        for policy in (None, RequestPolicy(alpha=0.6)):
            (trace,) = decoder.generate("hello", max_new_tokens=4, policy=policy).traces
            assert trace.header.population == population
            trips.setdefault(population, []).append(trace.tripped)
    assert trips == {"benign": [True, True], "begun": [False, False]}


def test_a_check_that_is_certified_for_benign_responses_alone_takes_no_other(llama, tokenizer):
    bundle = with_populations(llama, tokenizer, benign=0.0, begun=1.0)
    with pytest.raises(ConfigurationError, match=r"population='begun' is refused with self_check"):
        SafeDecoder(llama, tokenizer, bundle, self_check="bundle", population="begun")


def test_what_code_asks_of_a_model_is_forwarded(llama, tokenizer):
    model, decoder = llama, decoder_for(llama, tokenizer)
    assert decoder.device == model.device and decoder.dtype == model.dtype
    assert decoder.config is model.config and decoder.tokenizer is tokenizer
    assert decoder.generation_config is model.generation_config
