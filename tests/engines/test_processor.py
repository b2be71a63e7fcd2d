import pytest
import torch

from safe_decode.errors import UnsupportedError
from safe_decode.testing.bundles import REFUSAL, decoder_for, peaks, threshold_between
from safe_decode.testing.models import EOS, tiny_model
from tests.laws.test_failure_injection import PROMPTS, encoded, run_bare


@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
def test_untripped_rows_are_bare_and_tripped_ones_say_the_refusal(model, tokenizer, options):
    inputs = encoded(model, tokenizer)
    call = {"max_new_tokens": 60, **options}
    torch.manual_seed(0)
    bare = model.generate(**inputs, **call)
    torch.manual_seed(0)
    flagged, traces = run_bare(
        decoder_for(model, tokenizer, redirect="flag"), model, inputs, **call
    )
    assert torch.equal(flagged, bare)
    tops = [max(step.statistic for step in trace.steps) for trace in traces]
    threshold = threshold_between(tops)
    torch.manual_seed(0)
    ids, traces = run_bare(
        decoder_for(model, tokenizer, threshold=threshold), model, inputs, **call
    )
    assert {trace.tripped for trace in traces} == {True, False}
    for row, trace in enumerate(traces):
        n = min(ids.shape[1], bare.shape[1])
        if not trace.tripped:
            assert torch.equal(ids[row, :n], bare[row, :n])
            assert trace.end.outcome == "released"
        elif not trace.end.refusal_truncated:
            assert trace.end.outcome == "refused"
            assert tokenizer.decode(ids[row], skip_special_tokens=True).endswith(REFUSAL)


def test_the_handle_sees_the_same_statistics_as_the_decoder(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="flag")
    whole = decoder.generate(PROMPTS, max_new_tokens=9)
    _, traces = run_bare(decoder, llama, encoded(llama, tokenizer), max_new_tokens=9)
    for ours, theirs in zip(traces, whole.traces, strict=True):
        n = len(ours.steps)
        assert [s.statistic for s in ours.steps] == [s.statistic for s in theirs.steps[:n]]
        assert [s.token for s in ours.steps] == [s.token for s in theirs.steps[:n]]
        assert ours.end.unscored_tail == len(theirs.steps) - n == 1
    assert peaks(whole)


@pytest.mark.parametrize("before_cap", [0, 1, 2])
def test_a_trip_near_the_cap_truncates_the_refusal_and_says_so(llama, tokenizer, before_cap):
    inputs = encoded(llama, tokenizer)
    inputs = {key: value[2:] for key, value in inputs.items()}
    _, traces = run_bare(
        decoder_for(llama, tokenizer, redirect="flag"), llama, inputs, max_new_tokens=40
    )
    values = [step.statistic for step in traces[0].steps]
    at = next(i for i in range(4, len(values)) if values[i] > values[i - 1] + 1e-3)
    decoder = decoder_for(llama, tokenizer, threshold=(values[at] + values[at - 1]) / 2)
    # Score `at` comes before token `at` is chosen, the last one at cap = at + 1.
    ids, traces = run_bare(decoder, llama, inputs, max_new_tokens=at + 1 + before_cap)
    end = traces[0].end
    assert end.trip_step == at and end.refusal_truncated and end.released_tokens == at
    forced = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] + at :])
    assert forced == f" ... {REFUSAL}"[: 1 + before_cap]


def test_a_refusal_ends_on_a_model_without_eos(tokenizer):
    model = tiny_model("llama")
    decoder = decoder_for(model, tokenizer, threshold=-1e9)
    model.generation_config.eos_token_id = None
    inputs = encoded(model, tokenizer)
    ids, traces = run_bare(decoder, model, inputs, max_new_tokens=60)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + len(REFUSAL)
    assert [trace.end.outcome for trace in traces] == ["refused"] * 3


def test_without_the_criterion_a_forced_eos_ends_the_row(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, threshold=-1e9)
    inputs = encoded(llama, tokenizer)
    with decoder.processor(**inputs) as handle:
        ids = llama.generate(
            **inputs, logits_processor=[handle.logits_processor], max_new_tokens=60
        )
    assert ids[:, -1].tolist() == [EOS] * 3
    assert ids.shape[1] == inputs["input_ids"].shape[1] + len(REFUSAL) + 1


def test_stop_ends_the_row_without_a_text(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, threshold=-1e9)
    inputs = encoded(llama, tokenizer)
    with decoder.processor(**inputs, redirect="stop") as handle:
        ids = llama.generate(
            **inputs,
            logits_processor=[handle.logits_processor],
            stopping_criteria=[handle.stopping_criteria],
            max_new_tokens=9,
        )
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 1
    assert [trace.end.outcome for trace in handle.traces] == ["stopped"] * 3


def test_rewind_is_refused_by_name(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer)
    with (
        pytest.raises(UnsupportedError, match="rewind"),
        decoder.processor(**encoded(llama, tokenizer), redirect="rewind"),
    ):
        pass


def test_num_return_sequences_is_one_row_each(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer)
    inputs = encoded(llama, tokenizer)
    with decoder.processor(**inputs, num_return_sequences=2) as handle:
        llama.generate(
            **inputs,
            logits_processor=[handle.logits_processor],
            stopping_criteria=[handle.stopping_criteria],
            max_new_tokens=4,
            do_sample=True,
            num_return_sequences=2,
        )
    assert len(handle.traces) == 6
