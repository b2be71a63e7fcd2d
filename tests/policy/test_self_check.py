"""The second rung: what is cleared changes nothing, what is confirmed trips."""

from __future__ import annotations

import math

import pytest
import torch

from safe_decode.errors import ConfigurationError
from safe_decode.policy.self_check import SelfCheck
from safe_decode.testing.bundles import decoder_for, peaks, random_probe, threshold_between
from safe_decode.testing.models import ASSISTANT
from safe_decode.trace.replay import replay
from safe_decode.trace.schema import read_traces
from tests.laws.test_failure_injection import hooks_of
from tests.laws.test_laws import bare, same_row

PROMPTS = ["hello", "what is it?", "tell me a long story", "go", "abc"]
MODES = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 40}}


def check(threshold, **changes):
    return SelfCheck(random_probe(seed=5), threshold, **changes)


def middle(model, tokenizer, **options):
    torch.manual_seed(0)
    flagged = decoder_for(model, tokenizer, redirect="flag").generate(PROMPTS, **options)
    return threshold_between(peaks(flagged))


@pytest.mark.parametrize("mode", MODES)
def test_a_cleared_alarm_changes_no_token_and_draws_nothing(llama, tokenizer, mode):
    options = {"max_new_tokens": 40, **MODES[mode]}
    threshold = middle(llama, tokenizer, **options)
    theirs, _, after = bare(llama, tokenizer, PROMPTS, **options)
    decoder = decoder_for(
        llama,
        tokenizer,
        threshold=threshold,
        self_check=check(math.inf, every_tokens=5, max_looks=100),
    )
    torch.manual_seed(0)
    output = decoder.generate(PROMPTS, **options)
    assert torch.equal(torch.rand(3), after) and torch.equal(output.sequences, theirs)
    looked = 0
    for trace in output.traces:
        alarms = [step for step in trace.steps if step.statistic > threshold]
        assert trace.end.outcome == "released" and not trace.tripped
        assert all((step.action, step.why) == ("alarm", "cleared") for step in alarms)
        looks = [step.position for step in trace.steps if step.check is not None]
        assert looks == [step.position for step in alarms][::5], "c scores lie between looks"
        looked += bool(looks)
        (read,) = read_traces(trace.lines(token_ids=True))
        assert read == trace and replay(read, decoder.bundle.monitor).differences == ()
    assert looked and not hooks_of(llama)


def test_a_confirmed_alarm_is_a_trip_like_any_other(llama, tokenizer):
    options = {"max_new_tokens": 40}
    threshold = middle(llama, tokenizer, **options)
    plain = decoder_for(llama, tokenizer, redirect="refuse", threshold=threshold)
    asked = decoder_for(
        llama, tokenizer, redirect="refuse", threshold=threshold, self_check=check(-math.inf)
    )
    whole, output = plain.generate(PROMPTS, **options), asked.generate(PROMPTS, **options)
    assert whole.texts == output.texts
    assert True in [trace.tripped for trace in whole.traces]
    for a, b in zip(whole.traces, output.traces, strict=True):
        assert a.end == b.end
    with asked.stream(PROMPTS, **options) as stream:
        ends = {event.row: event for event in stream}
    assert [ends[row].text for row in range(len(PROMPTS))] == output.texts


def test_looks_are_bounded_and_the_last_alarm_stands(llama, tokenizer):
    options = {"max_new_tokens": 40}
    threshold = middle(llama, tokenizer, **options)
    decoder = decoder_for(
        llama,
        tokenizer,
        redirect="refuse",
        threshold=threshold,
        self_check=check(math.inf, every_tokens=3, max_looks=2),
    )
    theirs, width, _ = bare(llama, tokenizer, PROMPTS, **options)
    output = decoder.generate(PROMPTS, **options)
    trips = 0
    for row, trace in enumerate(output.traces):
        looks = [step.position for step in trace.steps if step.check is not None]
        assert len(looks) <= 2
        if trace.tripped:
            trips += 1
            assert trace.end.trip_step == looks[-1] + 3 == trace.steps[-1].position
            kept = trace.end.released_tokens
            assert same_row(output.sequences[row, : width + kept], theirs[row])
    assert trips


def test_a_look_sees_the_row_and_the_header_and_nothing_unjudged(llama, tokenizer):
    decoder = decoder_for(
        llama, tokenizer, threshold=-1e9, self_check=check(math.inf, max_looks=99, every_tokens=4)
    )
    seen = []
    spy = llama.model.embed_tokens.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].tolist())
    )
    output = decoder.generate(["hello", "what is it?"], max_new_tokens=6)
    spy.remove()
    looks = [ids[0] for ids in seen if len(ids) == 1]
    assert looks and all(ids[-1] == ASSISTANT and 0 not in ids for ids in looks)
    prompts = [output.sequences[row, : output.sequences.shape[1] - 6] for row in range(2)]
    first = [ids[ids != 0].tolist() for ids in prompts]
    assert looks[0][:-1] == first[0] and looks[1][:-1] == first[1]


def test_a_look_that_fails_clears_nothing(llama, tokenizer):
    decoder = decoder_for(
        llama, tokenizer, redirect="refuse", threshold=-1e9, self_check=check(math.inf)
    )

    class Fails:
        def __call__(self, _features):
            raise RuntimeError("another device")

    own, tap, header = decoder._self_check
    object.__setattr__(own, "probe", Fails())
    decoder._self_check = (own, tap, header)
    output = decoder.generate("go", max_new_tokens=6)
    assert output.texts == [decoder.refusal] and math.isnan(output.traces[0].steps[0].check)


def test_bad_settings_of_a_self_check_are_refused():
    for changes in ({"every_tokens": 0}, {"max_looks": 0}):
        with pytest.raises(ConfigurationError, match=next(iter(changes))):
            check(0.0, **changes)
    with pytest.raises(ConfigurationError, match="NaN"):
        check(math.nan)
