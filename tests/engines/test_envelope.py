"""A certificate covers what the table says it covers, in the library and on the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    QuantizedCache,
    StoppingCriteriaList,
    TextStreamer,
)

from safe_decode.certificate import Certificate, Envelope
from safe_decode.engines.transformers.capabilities import TABLE
from safe_decode.engines.transformers.coverage import departure, options_in_force, record_of
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import CertificateError
from safe_decode.prompts.batch import from_prompts
from safe_decode.testing.bundles import bundle_for
from safe_decode.testing.models import EOS, byte_tokenizer, tiny_model

CAP, HOLDBACK = 8, 2
GREEDY = Envelope(
    max_new_tokens=CAP + HOLDBACK, do_sample=False, temperature=1.0, top_p=1.0, top_k=50
)
SAMPLED = replace(GREEDY, do_sample=True)

VOIDING: Mapping[str, Any] = {
    "do_sample": True,
    "temperature": 0.4,
    "top_k": 3,
    "top_p": 0.3,
    "top_h": 0.3,
    "min_p": 0.5,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.3,
    "max_new_tokens": CAP + 1,
    "max_length": 60,
    "min_new_tokens": 3,
    "min_length": 40,
    "logits_processor": lambda: LogitsProcessorList([Keeps()]),
    "prefix_allowed_tokens_fn": lambda: lambda _row, _ids: list(range(200)),
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[70]],
    "sequence_bias": [[[70], 2.0]],
    "suppress_tokens": [70, 71],
    "begin_suppress_tokens": [70],
    "forced_bos_token_id": 70,
    "forced_eos_token_id": EOS,
    "exponential_decay_length_penalty": (2, 4.0),
    "eos_token_id": [EOS, 70],
    "num_beams": 2,
    "past_key_values": lambda: filled_cache(),
    "inputs_embeds": lambda: embeddings(),
    "cache_config": {"backend": "fp8"},
    "cache_implementation": "quantized",
}
"""A value of each option that moves responses."""

COVERED: Mapping[str, Any] = {
    "num_return_sequences": 2,
    "max_time": 1e-9,
    "stop_strings": ["a", "b"],
    "stopping_criteria": lambda: StoppingCriteriaList([MaxTimeCriteria(1e-9)]),
    "renormalize_logits": True,
    "generation_config": lambda: GenerationConfig(repetition_penalty=1.0, max_new_tokens=4),
    "input_ids": None,
    "inputs": None,
    "attention_mask": None,
    "tokenizer": byte_tokenizer,
    "bos_token_id": 70,
    "pad_token_id": 70,
    "use_cache": False,
    "disable_compile": True,
    "early_stopping": True,
    "length_penalty": 6.0,
    "assistant_model": lambda: tiny_model(seed=1),
    "assistant_tokenizer": None,
    "prompt_lookup_num_tokens": 3,
    "num_assistant_tokens": 2,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.9,
    "assistant_lookbehind": 4,
    "target_lookbehind": 4,
    "max_matching_ngram_size": 1,
    "prefill_chunk_size": 4,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "streamer": lambda: TextStreamer(byte_tokenizer()),
    "max_cache_len": 90,
    "decoder_start_token_id": 5,
    "low_memory": True,
}
"""A value of each option that moves none; None: the test is a call of its own, below."""

BESIDE: Mapping[str, dict[str, Any]] = {
    "max_cache_len": {"cache_implementation": "static"},
    "num_return_sequences": {"do_sample": True},
    **dict.fromkeys(
        ("output_scores", "output_logits", "output_hidden_states", "output_attentions"),
        {"return_dict_in_generate": True},
    ),
}
"""What an option goes with."""


class Keeps(LogitsProcessor):
    """Does nothing; the guard cannot know."""

    def __call__(self, _ids, scores):
        return scores


def made(value: Any) -> Any:
    is_made = isinstance(value, (LogitsProcessorList, nn.Module))
    return value() if callable(value) and not is_made else value


def filled_cache() -> DynamicCache:
    model, tokenizer = tiny_model(), byte_tokenizer()
    ids = from_prompts(tokenizer, "hello", None, model.device).input_ids
    cache = DynamicCache()
    model(input_ids=ids[:, :2], past_key_values=cache)
    return cache


def embeddings() -> torch.Tensor:
    ids = from_prompts(byte_tokenizer(), "hello", None, torch.device("cpu")).input_ids
    return tiny_model().get_input_embeddings()(ids).detach()


def certified(
    envelope: Envelope, *, model: Any = None, strict: bool = False, tokenizer: Any = None
) -> SafeDecoder:
    model, tokenizer = model or tiny_model(), tokenizer or byte_tokenizer()
    certificate = Certificate.compute(
        [1e9] * 20, alpha=0.5, delta=0.05, population="benign", envelope=envelope
    )
    bundle = bundle_for(model, tokenizer, certificates=(certificate,))
    return SafeDecoder(model, tokenizer, bundle, redirect="refuse", strict=strict)


def run(decoder: SafeDecoder, options: Mapping[str, Any]) -> set[str]:
    given = {"max_new_tokens": CAP, **{name: made(value) for name, value in options.items()}}
    output = decoder.generate(None if "inputs_embeds" in given else "hello", **given)
    return {trace.header.certificate for trace in output.traces}


def rows_with(*effects: str) -> set[str]:
    return {
        row.feature
        for row in TABLE
        if row.effect in effects and row.status not in ("served", "installed")
    }


def options_for(name: str, value: Any) -> dict[str, Any]:
    beside = BESIDE.get(name, {})
    if name == "max_length":
        beside = {"max_new_tokens": None}
    if name in SAMPLED_ONLY:
        beside = {"do_sample": True}
    return {**beside, name: value}


SAMPLED_ONLY = rows_with("sampled")


def test_every_option_of_the_table_is_here_with_what_it_does_to_a_certificate() -> None:
    assert set(VOIDING) == rows_with("certified", "sampled", "voids")
    assert set(COVERED) == rows_with("same", "shortens")


def test_every_field_of_the_installed_generation_config_has_an_effect() -> None:
    public = {key for key in vars(GenerationConfig()) if not key.startswith("_")}
    known = set(VOIDING) | set(COVERED) | {r.feature for r in TABLE if r.effect == "refused"}
    assert public - known == {"transformers_version", "compile_config"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in VOIDING if name != "cache_implementation"])
def test_an_option_that_moves_responses_voids_by_its_name_and_is_refused_if_strict(name) -> None:
    envelope = SAMPLED if name in SAMPLED_ONLY else GREEDY
    options = options_for(name, VOIDING[name])
    (said,) = run(certified(envelope), options)
    shown = {"max_length": "max_new_tokens=", "inputs_embeds": "a raw completion"}
    assert said.startswith(f"void({shown.get(name, f'{name}=')}"), said
    strict = certified(envelope, strict=True)
    forwards: list[int] = []
    strict.model.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(CertificateError, match=r"outside the certified envelope: "):
        run(strict, options)
    assert not forwards


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, value in COVERED.items() if value is not None])
def test_an_option_that_moves_no_response_leaves_the_certificate_valid(name) -> None:
    options = options_for(name, COVERED[name])
    eager = {"attn_implementation": "eager"} if name == "output_attentions" else {}
    envelope = SAMPLED if options.get("do_sample") else GREEDY
    decoder = certified(envelope, model=tiny_model(**eager), strict=True)
    assert run(decoder, options) == {"valid"}


def test_ids_masks_and_assistants_with_a_tokenizer_leave_it_valid() -> None:
    decoder = certified(GREEDY, strict=True)
    tokenizer = decoder.tokenizer
    inputs = from_prompts(tokenizer, ["hello", "a longer one"], None, decoder.model.device)
    ids, attention_mask = inputs.input_ids, inputs.attention_mask
    draft = {
        "assistant_model": tiny_model(seed=1),
        "assistant_tokenizer": byte_tokenizer(),
        "tokenizer": tokenizer,
    }
    outputs = [
        decoder.generate(input_ids=ids, attention_mask=attention_mask, max_new_tokens=3),
        decoder.generate(inputs=ids, attention_mask=attention_mask, max_new_tokens=3),
        decoder.generate("hello", max_new_tokens=3, **draft),
    ]
    for output in outputs:
        assert {trace.header.certificate for trace in output.traces} == {"valid"}


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0},
        {"eos_token_id": EOS, "num_beams": 1, "suppress_tokens": None},
        {"logits_processor": LogitsProcessorList(), "past_key_values": DynamicCache},
        {"cache_implementation": "static"},
        {"temperature": 0.4, "top_k": 3, "min_p": 0.5},
        {"seed": 5},
    ],
    ids=str,
)
def test_neutral_values_and_those_of_sampling_in_greedy_calls_stay_inside(options) -> None:
    assert run(certified(GREEDY, strict=True), options) == {"valid"}


@pytest.mark.parametrize("where", ["given", "own"])
def test_options_are_read_from_configurations_as_generate_reads_them(where: str) -> None:
    decoder = certified(GREEDY)
    options: dict[str, Any] = {}
    if where == "given":
        options["generation_config"] = GenerationConfig(repetition_penalty=1.3)
    else:
        decoder.model.generation_config.repetition_penalty = 1.3
    assert run(decoder, options) == {"void(repetition_penalty=1.3 is not 1.0)"}
    assert run(decoder, {"repetition_penalty": 1.0}) == {"valid"}


def test_what_was_in_force_when_calibrating_is_what_is_covered(tmp_path) -> None:
    model = tiny_model()
    model.generation_config.update(repetition_penalty=1.1, min_p=0.2)
    options = record_of(model.generation_config, (EOS,))
    assert options == {"repetition_penalty": "1.1", "min_p": "0.2", "eos_token_id": f"[{EOS}]"}
    decoder = certified(replace(GREEDY, options=options), model=model)
    assert run(decoder, {}) == {"valid"}
    assert run(decoder, {"min_p": 0.9}) == {"valid"}  # without meaning if greedy
    assert run(decoder, {"repetition_penalty": 1.0}) == {"void(repetition_penalty=1.0 is not 1.1)"}
    assert run(decoder, {"eos_token_id": 70}) == {f"void(eos_token_id=[70] is not [{EOS}])"}
    sampled = certified(replace(SAMPLED, options=options), model=model)
    assert run(sampled, {"do_sample": True, "min_p": 0.9}) == {"void(min_p=0.9 is not 0.2)"}
    # And it is so after the bundle was written and read.
    decoder.bundle.save(tmp_path / "bundle")
    read = type(decoder.bundle).load(tmp_path / "bundle")
    assert read.certificate().envelope.options == options
    assert read.digest == decoder.bundle.digest


def test_a_bundle_without_a_record_is_written_as_before() -> None:
    files = certified(GREEDY).bundle._files()
    assert b'"options"' not in files["card.json"]


def test_unseen_tokens_behind_a_cap_count_towards_what_is_certified() -> None:
    largest = certified(GREEDY).certified_cap
    assert largest == CAP
    for redirect, cap, is_valid in (
        ("refuse", largest, True),
        ("refuse", largest + 1, False),
        ("flag", CAP + HOLDBACK, True),  # which looks at nothing
        ("flag", CAP + HOLDBACK + 1, False),
    ):
        output = certified(GREEDY).generate("go", max_new_tokens=cap, redirect=redirect)
        assert (output.traces[0].header.certificate == "valid") == is_valid, (redirect, cap)


def test_an_envelope_names_the_first_departure() -> None:
    envelope = Envelope(256, True, 0.7, 0.9, 0)
    greedy = replace(envelope, do_sample=False)

    def said(certified: Envelope, **changes: Any) -> str | None:
        return departure(certified, replace(certified, **changes))

    assert said(envelope) is None and said(envelope, max_new_tokens=8) is None
    assert said(envelope, max_new_tokens=257) == "max_new_tokens=257 exceeds 256"
    assert said(envelope, temperature=1.3) == "temperature=1.3 is not 0.7"
    assert said(envelope, top_k=9) == "top_k=9 is not 0"
    assert said(envelope, do_sample=False) == "do_sample=False is not True"
    assert said(greedy, temperature=1.0, top_k=9) is None
    assert said(greedy, options={"suppress_tokens": "[1, 2]"}) == (
        "suppress_tokens=[1, 2] is not None"
    )


def test_quantized_caches_void_by_name() -> None:
    # Read as generate prepares it; to run it takes packages that are not installed here.
    def said(certified: Envelope, kind: str) -> str | None:
        config = GenerationConfig(cache_implementation=kind)
        return departure(certified, replace(GREEDY, options=options_in_force(config)))

    kinds = ("dynamic", "static", "offloaded", "offloaded_static")
    assert [said(GREEDY, kind) for kind in kinds] == [None] * 4
    assert said(GREEDY, "quantized") == "cache_implementation='quantized' is not 'dynamic'"
    quantized = replace(GREEDY, options={"cache_implementation": '"quantized"'})
    assert said(quantized, "quantized") is None
    assert said(quantized, "static") == "cache_implementation='dynamic' is not 'quantized'"


def test_a_cache_of_a_kind_that_rounds_and_a_filled_one_void() -> None:
    decoder = certified(GREEDY)
    (said,) = run(decoder, {"past_key_values": filled_cache})
    assert said.startswith("void(past_key_values=<DynamicCache of 2 positions> is not covered")
    from safe_decode.engines.transformers.coverage import given_options

    empty = object.__new__(QuantizedCache)
    empty.layers = []
    assert given_options({"past_key_values": empty}) == {"past_key_values": '"<QuantizedCache>"'}


@pytest.mark.parametrize(
    "criterion", [MaxLengthCriteria(40), EosTokenCriteria(70)], ids=lambda c: type(c).__name__
)
def test_a_criterion_in_the_place_of_the_cap_or_the_end_voids(criterion: Any) -> None:
    options = {"stopping_criteria": lambda: StoppingCriteriaList([criterion])}
    (said,) = run(certified(GREEDY), options)
    assert said.startswith(f"void(stopping_criteria=<{type(criterion).__name__}> is not covered")
    with pytest.raises(CertificateError, match="stopping_criteria=<"):
        run(certified(GREEDY, strict=True), options)


def test_a_strict_decoder_refuses_a_foreign_generate() -> None:
    decoder = certified(GREEDY, strict=True)
    ids = from_prompts(decoder.tokenizer, "hello", None, decoder.model.device).input_ids
    with (
        pytest.raises(CertificateError, match="strict=True is refused with processor"),
        decoder.processor(ids),
    ):
        pass


# --- the server reads the same table


def served(decoder: SafeDecoder, chat_template_kwargs: Any = None, **sampling: Any) -> str:
    from safe_decode.engines.rows import Row, RowPolicy, RowRequest, Sampling
    from safe_decode.engines.transformers.batch.engine import TransformersEngine

    engine = TransformersEngine(decoder, keep_traces=True)
    chosen = Sampling(**{"max_tokens": CAP, "seed": 0, **sampling})
    prompt = engine.chat([{"role": "user", "content": "hello"}])
    prompt = replace(prompt, variables=chat_template_kwargs or {})
    row = Row(RowRequest(prompt, chosen, RowPolicy(0.5, "refuse", 2)), lambda _event: None)
    engine.run([row])
    engine.close()
    assert row.trace is not None
    return row.trace.header.certificate


SERVED_VOIDING: Mapping[str, Any] = {
    "logit_bias": {70: 3.0},
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "ignore_eos": True,
    "chat_template_kwargs": {"enable_thinking": False},
}


def test_every_option_of_requests_is_here() -> None:
    assert set(SERVED_VOIDING) == {row.feature for row in TABLE if row.status == "served"}


@pytest.mark.parametrize("name", SERVED_VOIDING)
def test_an_option_of_a_request_voids_by_its_name(name: str) -> None:
    said = served(certified(GREEDY), **{name: SERVED_VOIDING[name]})
    assert said.startswith(f"void({name}=")
    assert said.endswith("an option of requests to the server)")


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({}, "valid"),
        ({"max_tokens": 3, "stop": ("a",), "seed": 9, "top_k": 3}, "valid"),
        (
            {"max_tokens": CAP + 1},
            f"void(max_new_tokens={CAP + 1} and {HOLDBACK} unseen ones behind it exceed "
            f"{CAP + HOLDBACK} together)",
        ),
        ({"temperature": 0.5}, "void(do_sample=True is not False)"),
        ({"min_tokens": 2}, "void(min_new_tokens=2 is not 0)"),
        ({"repetition_penalty": 1.3}, "void(repetition_penalty=1.3 is not 1.0)"),
        ({"repetition_penalty": 1.0, "min_p": 0.2}, "valid"),  # greedy: no share is looked at
    ],
    ids=str,
)
def test_the_server_covers_what_the_library_covers(sampling, said) -> None:
    assert served(certified(GREEDY), **sampling) == said


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 3), ("top_p", 0.5), ("temperature", 0.3), ("min_p", 0.2)]
)
def test_the_sampling_of_a_request_is_that_of_the_certificate_or_voids(name, value) -> None:
    own: dict[str, Any] = {"temperature": 1.0, "top_k": 50}
    assert served(certified(SAMPLED), **own) == "valid"
    said = served(certified(SAMPLED), **{**own, name: value})
    assert said.startswith(f"void({name}={value} is not ")


def test_the_server_sees_the_model_s_own_configuration_and_its_end() -> None:
    edits: list[tuple[Callable[[Any], Any], str]] = [
        (lambda c: c.update(repetition_penalty=1.3), "void(repetition_penalty=1.3 is not 1.0)"),
        (lambda c: c.update(min_p=0.3), "valid"),  # the row sampler has a request's alone
    ]
    for edit, said in edits:
        decoder = certified(GREEDY)
        edit(decoder.model.generation_config)
        assert served(decoder) == said
    recorded = replace(SAMPLED, options={"min_p": "0.3"})
    own: dict[str, Any] = {"temperature": 1.0, "top_k": 50}
    assert served(certified(recorded), **own) == "void(min_p=0.0 is not 0.3)"


def test_a_prepared_configuration_hides_the_length_that_generate_derives() -> None:
    config = GenerationConfig(min_new_tokens=4, min_length=40)
    assert options_in_force(config) == {"min_new_tokens": "4"}
