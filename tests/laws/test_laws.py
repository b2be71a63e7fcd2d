"""The laws of generation, on tiny random models whose statistic is shown to move."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from safe_decode.engines.transformers.capabilities import TABLE
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import CertificateError, FingerprintMismatchError, UnsupportedError
from safe_decode.monitor.monitor import reference
from safe_decode.policy.holdback import released_tokens
from safe_decode.prompts.batch import from_prompts
from safe_decode.testing.bundles import (
    OPENER,
    REFUSAL,
    bundle_for,
    decoder_for,
    peaks,
    threshold_between,
)
from safe_decode.testing.models import byte_tokenizer, tiny_model

PROMPTS = ["hello", "what is it?", "tell me a long story", "go", "abc"]
CAP = 40
MODES = {
    "greedy": {"max_new_tokens": CAP},
    "sampled": {"max_new_tokens": CAP, "do_sample": True, "temperature": 0.9, "top_k": 40},
}


def bare(model, tok, prompts=PROMPTS, prefill=None, seed=0, **options):
    inputs = from_prompts(tok, prompts, prefill, model.device)
    torch.manual_seed(seed)
    ids = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **options
    )
    return ids, inputs.input_ids.shape[1], torch.rand(3)


def same_row(ours, theirs):
    n = min(len(ours), len(theirs))
    return torch.equal(ours[:n], theirs[:n])


# --- 1. No-op law


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("redirect", ["refuse", "rewind", "stop"])
def test_untripped_rows_have_the_bare_models_ids_beside_tripping_neighbours(
    model, tokenizer, mode, redirect
):
    theirs, width, after = bare(model, tokenizer, **MODES[mode])
    flagged = decoder_for(model, tokenizer, redirect="flag")
    torch.manual_seed(0)
    tops = peaks(flagged.generate(PROMPTS, **MODES[mode]))
    assert max(tops) - min(tops) > 0.3, "the statistic must move"
    threshold = threshold_between(tops)
    decoder = decoder_for(model, tokenizer, redirect=redirect, threshold=threshold)
    torch.manual_seed(0)
    output = decoder.generate(PROMPTS, **MODES[mode])
    draws = torch.rand(3)
    tripped = [trace.tripped for trace in output.traces]
    assert True in tripped and False in tripped
    assert tripped == [top > threshold for top in tops]
    for row, has_tripped in enumerate(tripped):
        assert torch.equal(output.sequences[row, :width], theirs[row, :width])
        if not has_tripped:
            assert same_row(output.sequences[row], theirs[row])
            assert output.traces[row].end.outcome == "released"
            assert output.texts[row] == tokenizer.decode(
                theirs[row, width:], skip_special_tokens=True
            )
            # A batch ends with its last untripped row; where bare ends there too, both have
            # drawn as often, and continuations have drawn from elsewhere.
            if output.traces[row].end.released_tokens == CAP:
                assert torch.equal(draws, after), "the global generator moved otherwise"


def test_untripped_rows_are_bare_with_num_return_sequences_and_many_ends(tokenizer):
    model = tiny_model("llama")
    options = {
        "max_new_tokens": CAP,
        "do_sample": True,
        "num_return_sequences": 3,
        "eos_token_id": list(range(100, 120)),
    }
    theirs, width, _ = bare(model, tokenizer, PROMPTS[:2], **options)
    torch.manual_seed(0)
    tops = peaks(decoder_for(model, tokenizer).generate(PROMPTS[:2], **options))
    torch.manual_seed(0)
    output = decoder_for(
        model, tokenizer, redirect="refuse", threshold=threshold_between(tops)
    ).generate(PROMPTS[:2], **options)
    tripped = [trace.tripped for trace in output.traces]
    assert True in tripped and False in tripped and len(tripped) == 6
    for row, has_tripped in enumerate(tripped):
        assert has_tripped or same_row(output.sequences[row], theirs[row])


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"repetition_penalty": 1.3},
        {"stop_strings": ["a", "e", "1"]},
        {"eos_token_id": None, "pad_token_id": None},
        {"min_new_tokens": 5, "bad_words_ids": [[60], [61, 62]]},
    ],
)
def test_supported_options_leave_untripped_rows_bare(llama, tokenizer, options):
    call = {"max_new_tokens": 20, **options}
    extra = {"tokenizer": tokenizer} if "stop_strings" in options else {}
    if "eos_token_id" in options:
        llama.generation_config.eos_token_id = llama.generation_config.pad_token_id = None
    theirs, _, _ = bare(llama, tokenizer, **call, **extra)
    tops = peaks(decoder_for(llama, tokenizer).generate(PROMPTS, **call))
    output = decoder_for(
        llama, tokenizer, redirect="refuse", threshold=threshold_between(tops)
    ).generate(PROMPTS, **call)
    tripped = [trace.tripped for trace in output.traces]
    assert True in tripped and False in tripped
    for row, has_tripped in enumerate(tripped):
        assert has_tripped or same_row(output.sequences[row], theirs[row])


# --- 2. Row law


def test_a_rows_statistics_do_not_depend_on_neighbours_or_padding(model, tokenizer):
    decoder = decoder_for(model, tokenizer, redirect="flag")
    together = decoder.generate(PROMPTS, max_new_tokens=12)
    for row, prompt in enumerate(PROMPTS):
        alone = decoder.generate(prompt, max_new_tokens=12).traces[0]
        beside = together.traces[row]
        n = min(len(alone.steps), len(beside.steps))
        # Left padding changes the order of float32 sums, nothing else.
        for a, b in zip(alone.steps[:n], beside.steps[:n], strict=True):
            assert a.token == b.token
            assert a.statistic == pytest.approx(b.statistic, abs=2e-4)


def test_each_row_scans_its_own_prefill_in_order(model, tokenizer):
    decoder = decoder_for(model, tokenizer, redirect="flag")
    prefills = ["", "Sure, here", "I", None, "Of course! The first thing"]
    together = decoder.generate(PROMPTS, prefill=prefills, max_new_tokens=3)
    for row, (prompt, prefill) in enumerate(zip(PROMPTS, prefills, strict=True)):
        trace = together.traces[row]
        scans = [step for step in trace.steps if step.action == "scan"]
        assert [step.position for step in scans] == list(range(len(prefill or "") + 1))
        assert trace.end.prefill_tokens == len(prefill or "")
        assert tokenizer.decode([step.token for step in scans[1:]]) == (prefill or "")
        alone = decoder.generate(prompt, prefill=prefill, max_new_tokens=3).traces[0]
        for a, b in zip(alone.steps, trace.steps, strict=False):
            assert a.statistic == pytest.approx(b.statistic, abs=2e-4)


def test_statistics_while_generating_equal_those_of_the_finished_response(model, tokenizer):
    decoder = decoder_for(model, tokenizer, redirect="flag")
    answer = "Sure, here is"
    output = decoder.generate(["hello"], prefill=answer, max_new_tokens=1)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    scores = decoder.score([messages])[0]
    generated = output.traces[0].logits_of()
    assert scores.shape == (len(answer) + 1, 1)
    assert torch.allclose(torch.tensor(generated[: len(scores)]), scores, atol=2e-4)


# --- 4. Beat law


@pytest.mark.parametrize("mode", MODES)
def test_each_content_token_has_exactly_one_score(model, tokenizer, mode):
    options = {**MODES[mode], "eos_token_id": list(range(100, 112))}
    torch.manual_seed(0)
    output = decoder_for(model, tokenizer, redirect="flag").generate(PROMPTS, **options)
    for row, trace in enumerate(output.traces):
        new = output.sequences[row, -CAP:].tolist() if output.sequences.shape[1] >= CAP else []
        own = [step.token for step in trace.steps[1:]]
        assert all(token not in range(100, 112) for token in own)
        assert [step.position for step in trace.steps] == list(range(len(own) + 1))
        assert trace.end.released_tokens == len(own)
        assert not new or len(own) <= CAP


def test_a_row_that_ends_without_eos_gets_a_closing_forward(model, tokenizer):
    output = decoder_for(model, tokenizer, redirect="flag").generate(
        ["hello"], max_new_tokens=7, min_new_tokens=7
    )
    trace = output.traces[0]
    assert len(trace.steps) == 8 and trace.end.unscored_tail == 0
    assert trace.steps[-1].token == int(output.sequences[0, -1])


def test_options_that_would_skip_the_guard_are_refused_before_any_forward(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer)
    calls = []
    handle = llama.register_forward_hook(lambda *_: calls.append(1))
    for option, value in (("num_beam_groups", 4), ("use_mtp", True), ("guidance_scale", 2)):
        with pytest.raises(UnsupportedError, match=option):
            decoder.generate("hello", max_new_tokens=2, **{option: value})
    handle.remove()
    assert not calls and len(TABLE) > 50


# --- 5. Release law


@pytest.mark.parametrize("holdback", [0, 1, 4])
@pytest.mark.parametrize("redirect", ["refuse", "stop"])
def test_release_never_precedes_evaluation(llama, tokenizer, holdback, redirect):
    theirs, width, _ = bare(llama, tokenizer, max_new_tokens=CAP)
    tops = peaks(
        decoder_for(llama, tokenizer, redirect="flag").generate(PROMPTS, max_new_tokens=CAP)
    )
    decoder = decoder_for(
        llama, tokenizer, redirect=redirect, holdback=holdback, threshold=threshold_between(tops)
    )
    output = decoder.generate(PROMPTS, max_new_tokens=CAP)
    seen = 0
    for row, trace in enumerate(output.traces):
        if not trace.tripped:
            continue
        seen += 1
        passed = max(0, trace.end.trip_step - 1)
        kept = released_tokens(passed, holdback)
        assert trace.end.released_tokens == kept
        assert torch.equal(
            output.sequences[row, width : width + kept], theirs[row, width : width + kept]
        )
        stands = tokenizer.decode(theirs[row, width : width + kept], skip_special_tokens=True)
        refusal = "" if redirect == "stop" else (" ... " if kept else "") + REFUSAL
        assert output.texts[row] == stands + refusal
    assert seen


# The tail of a response is judged before it counts as released.
def test_a_trip_of_the_closing_forward_redirects_the_row(llama, tokenizer):
    flagged = decoder_for(llama, tokenizer, redirect="flag", holdback=1)
    trace = flagged.generate("go", max_new_tokens=CAP).traces[0]
    values = [step.statistic for step in trace.steps]
    rises = [i for i in range(4, len(values)) if values[i] > values[i - 1] + 1e-3]
    assert rises, "the statistic must rise somewhere"
    at = rises[0]
    for after in (0, 1, 2):  # trips at the cap, cap - 1 and cap - 2
        cap = at + after
        decoder = decoder_for(
            llama,
            tokenizer,
            redirect="refuse",
            holdback=1,
            threshold=(values[at] + values[at - 1]) / 2,
        )
        output = decoder.generate("go", max_new_tokens=cap)
        end = output.traces[0].end
        assert end.trip_step == at and end.outcome == "refused"
        assert end.released_tokens == max(0, at - 2)
        assert output.texts[0].endswith(REFUSAL), "the canned text is not cut by the cap"


# --- 6. Latch law


@pytest.mark.parametrize("mode", MODES)
def test_flag_changes_no_token_and_says_unprotected(model, tokenizer, mode):
    theirs, _, after = bare(model, tokenizer, **MODES[mode])
    torch.manual_seed(0)
    output = decoder_for(model, tokenizer, redirect="flag", threshold=-1e9).generate(
        PROMPTS, **MODES[mode]
    )
    assert torch.equal(output.sequences, theirs)
    assert torch.equal(torch.rand(3), after)
    for trace in output.traces:
        assert trace.end.unprotected and trace.end.outcome == "flagged" and trace.end.trip_step == 0


def test_a_tripped_row_never_returns_to_unguarded_decoding(model, tokenizer):
    tops = peaks(
        decoder_for(model, tokenizer, redirect="flag").generate(PROMPTS, max_new_tokens=80)
    )
    threshold = threshold_between(tops)
    decoder = decoder_for(model, tokenizer, redirect="rewind", threshold=threshold)
    for trace, text in zip(*_fields(decoder.generate(PROMPTS, max_new_tokens=80)), strict=True):
        if not trace.tripped:
            continue
        assert trace.end.outcome in ("rewound", "refused") and trace.end.tries <= 2
        later = [step for step in trace.steps if step.attempt]
        assert all(step.action in ("force", "watch", "trip") for step in later)
        if trace.end.outcome == "rewound":
            assert OPENER in text
            last = [step for step in later if step.attempt == trace.end.tries]
            assert max(step.statistic for step in last) <= threshold
        else:
            assert text.endswith(REFUSAL)


def _fields(output):
    return output.traces, output.texts


def test_rewind_finishes_in_the_models_own_words_under_the_probe(llama, tokenizer):
    seen = set()
    for prompt in ("hello", "go", "abc"):
        flag = decoder_for(llama, tokenizer, redirect="flag")
        flagged = flag.generate(prompt, max_new_tokens=100)
        values = [step.statistic for step in flagged.traces[0].steps]
        threshold = max(values) - 1e-3
        decoder = decoder_for(llama, tokenizer, redirect="rewind", threshold=threshold)
        output = decoder.generate(prompt, max_new_tokens=100)
        end = output.traces[0].end
        seen.add(end.outcome)
        assert end.trip_step is not None
        again = decoder.generate(prompt, max_new_tokens=100)
        assert again.texts == output.texts, "a continuation is reproducible"
    assert "rewound" in seen


def test_rewind_drops_a_prefill_on_which_nothing_released_builds(llama, tokenizer):
    prefill = "Sure, here is how"
    flag = decoder_for(llama, tokenizer, redirect="flag")
    steps = flag.generate("go", prefill=prefill, max_new_tokens=60).traces[0].steps
    top = max(step.statistic for step in steps if step.action == "scan" or step.position <= 17)
    decoder = decoder_for(llama, tokenizer, redirect="rewind", threshold=top - 1e-3)
    contexts = []
    spy = llama.model.embed_tokens.register_forward_pre_hook(
        lambda _m, args: contexts.append(tokenizer.decode(args[0][0]))
    )
    output = decoder.generate("go", prefill=prefill, max_new_tokens=60)
    spy.remove()
    assert output.traces[0].end.trip_step <= len(prefill) and output.traces[0].end.tries
    assert prefill in contexts[0], "the prefill itself is judged"
    continued = [context for context in contexts if OPENER in context]
    assert continued and not any(prefill in context for context in continued)
    assert prefill not in output.texts[0]
    kept = tokenizer.decode(output.sequences[0])
    assert prefill in kept, "the user's prompt ids stay in the sequences"


# --- 7. Closed law


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_one_rows_activations_redirects_it_and_spares_its_neighbours(
    llama, tokenizer, mode, bad
):
    theirs, width, after = bare(llama, tokenizer, **MODES[mode])
    calls = []

    def poison(_module, _args, output):
        calls.append(1)
        if len(calls) >= 5:
            output = output.clone()
            output[2] = bad
        return output

    handle = llama.model.layers[0].register_forward_hook(poison)
    torch.manual_seed(0)
    output = decoder_for(llama, tokenizer, redirect="rewind").generate(PROMPTS, **MODES[mode])
    handle.remove()
    assert torch.equal(torch.rand(3), after)
    for row, trace in enumerate(output.traces):
        if row == 2:
            assert trace.end.outcome == "closed" and "NonFiniteError" in trace.end.error
            assert trace.steps[-1].action == "close" and trace.steps[-1].why == "non_finite"
            assert output.texts[row].endswith(REFUSAL)
        else:
            assert trace.end.outcome == "released" and trace.end.error is None
            assert same_row(output.sequences[row], theirs[row])


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_one_rows_scores_redirects_it_and_spares_its_neighbours(llama, tokenizer, mode):
    theirs, width, _ = bare(llama, tokenizer, **MODES[mode])
    calls = []

    def poison(_module, _args, output):
        calls.append(1)
        if len(calls) >= 4:
            output = output.clone()
            output[1] = math.nan
        return output

    handle = llama.lm_head.register_forward_hook(poison)
    torch.manual_seed(0)
    output = decoder_for(llama, tokenizer, redirect="refuse").generate(PROMPTS, **MODES[mode])
    handle.remove()
    ends = [trace.end for trace in output.traces]
    assert ends[1].outcome == "closed" and "NaN or Inf in its scores" in ends[1].error
    assert output.texts[1].endswith(REFUSAL)
    for row in (0, 2, 3, 4):
        assert ends[row].outcome == "released"
        assert same_row(output.sequences[row], theirs[row])


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.5}])
def test_nan_in_a_rows_scores_ends_it_at_once_though_a_neighbour_has_ended(
    llama, tokenizer, sampling
):
    n_said, calls = 3, []

    def poison(_module, _args, output):
        calls.append(1)
        if len(calls) > 6:
            output = output.clone()
            output[1] = math.nan
        return output

    def first_row_ends(ids, _scores, **_options):
        prompt = ids.shape[1] - len(calls)
        return torch.tensor([ids.shape[1] - prompt >= n_said, *[False] * (len(ids) - 1)])

    handle = llama.lm_head.register_forward_hook(poison)
    torch.manual_seed(0)
    output = decoder_for(llama, tokenizer, redirect="refuse").generate(
        PROMPTS, max_new_tokens=16, stopping_criteria=[first_row_ends], **sampling
    )
    handle.remove()
    first, poisoned, *others = [trace.end for trace in output.traces]
    assert first.outcome == "released" and first.released_tokens == n_said
    assert poisoned.outcome == "closed" and "NaN or Inf in its scores" in poisoned.error
    assert poisoned.released_tokens + poisoned.dropped_tokens == 6
    assert {end.outcome for end in others} == {"released"}


def test_errors_can_be_allowed_and_then_show_in_the_trace(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="refuse", on_error="allow")
    layer = llama.model.layers[0].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _m, args: (args[0] * math.nan,), prepend=True)
    output = decoder.generate(PROMPTS, max_new_tokens=8)
    hook.remove()
    for trace in output.traces:
        assert trace.end.unprotected and "NonFiniteError" in trace.end.error
        assert trace.end.outcome == "released"


# --- 8. Certificate law


def test_a_foreign_fingerprint_is_refused_at_construction(llama, tokenizer):
    bundle = bundle_for(tiny_model("llama", seed=1), tokenizer)
    with pytest.raises(FingerprintMismatchError):
        SafeDecoder(llama, tokenizer, bundle)


def test_a_call_outside_the_envelope_voids_the_certificate_or_is_refused(llama, tokenizer):
    lenient = decoder_for(llama, tokenizer)
    inside = lenient.generate("hello", max_new_tokens=8).traces[0]
    assert inside.header.certificate == "valid"
    outside = lenient.generate("hello", max_new_tokens=63).traces[0]
    said = "max_new_tokens=63 and 2 unseen ones behind it exceed 64 together"
    assert outside.header.certificate == f"void({said})"
    begun = lenient.generate("hello", prefill="abc", max_new_tokens=59).traces[0]
    assert begun.header.certificate == "valid"
    longer = lenient.generate("hello", prefill="abc", max_new_tokens=60).traces[0]
    assert "a prefill of 3 tokens, max_new_tokens=60 and 2 unseen" in longer.header.certificate
    sampled = lenient.generate("hello", max_new_tokens=8, do_sample=True).traces[0]
    assert sampled.header.certificate == "void(do_sample=True is not False)"
    strict = decoder_for(llama, tokenizer, strict=True)
    strict.generate("hello", max_new_tokens=8)
    with pytest.raises(CertificateError, match="max_new_tokens=63 and 2 unseen"):
        strict.generate("hello", max_new_tokens=63)


def test_traces_replay_to_the_same_decisions(llama, tokenizer):
    tops = peaks(
        decoder_for(llama, tokenizer, redirect="flag").generate(PROMPTS, max_new_tokens=CAP)
    )
    threshold = threshold_between(tops)
    decoder = decoder_for(llama, tokenizer, redirect="refuse", threshold=threshold)
    for trace in decoder.generate(PROMPTS, max_new_tokens=CAP).traces:
        steps = reference(decoder.bundle.monitor, threshold, trace.logits_of())
        alarms = [index for index, step in enumerate(steps) if step.alarm]
        assert (alarms[0] if alarms else None) == trace.end.trip_step


# --- 10. Privacy law


def test_no_prompt_and_no_completion_is_logged(llama, tokenizer, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    secret = "xyzzy plugh"
    decoder = decoder_for(llama, tokenizer, redirect="refuse", threshold=-1e9)
    output = decoder.generate(secret, prefill="frotz", max_new_tokens=4)
    captured = capsys.readouterr()
    written = caplog.text + captured.out + captured.err
    written += "".join(output.traces[0].lines()) + repr(output.traces[0].end)
    for text in (secret, "frotz", output.texts[0]):
        assert text not in written


def test_byte_tokenizer_is_what_the_laws_assume():
    assert byte_tokenizer().padding_side == "left"
