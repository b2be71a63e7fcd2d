"""What closes a row, each check alone: where it is taken out, one of these tests fails."""

from __future__ import annotations

import math
import re

import pytest
import torch
from transformers import LogitsProcessor

from safe_decode.errors import UnsupportedError
from safe_decode.session.session import Session
from safe_decode.testing.bundles import REFUSAL, decoder_for
from tests.laws.test_failure_injection import PROMPTS, At, drop_all_hooks, encoded, run_bare
from tests.laws.test_laws import same_row

CUT = " ... "


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_row_closed_by_a_failed_guard_keeps_every_token_that_was_judged(llama, tokenizer, step):
    """The score that would have judged the next token is absent: none of the others is lost."""
    decoder = decoder_for(llama, tokenizer, holdback=0, redirect="refuse")
    drop = At(step, lambda: drop_all_hooks(llama))
    output = decoder.generate(
        PROMPTS, max_new_tokens=20, min_new_tokens=20, logits_processor=[drop]
    )
    bare = decoder_for(llama, tokenizer).generate(PROMPTS, max_new_tokens=20, min_new_tokens=20)
    for row, trace in enumerate(output.traces):
        said = bare.sequences[row, -20:]
        assert trace.end.outcome == "closed" and trace.end.released_tokens == step
        kept = tokenizer.decode(said[:step], skip_special_tokens=True)
        assert output.texts[row] == f"{kept}{CUT}{REFUSAL}"


@pytest.mark.parametrize("lost", [2, 5])
@pytest.mark.parametrize("on_error", ["close", "allow"])
def test_a_row_with_a_score_less_than_it_has_tokens_is_closed(
    llama, tokenizer, monkeypatch, lost, on_error
):
    """As many forwards as tokens, and one row of one of them judged by nobody."""
    judge, calls = Session.judge, []

    def judge_all_but_one(session, positions, active=None):
        calls.append(1)
        if len(calls) == lost:
            active = torch.ones(session.batch, dtype=torch.bool) if active is None else active
            active = active & (torch.arange(session.batch) != 1)
        return judge(session, positions, active)

    decoder = decoder_for(llama, tokenizer, redirect="refuse", on_error=on_error)
    options = {"max_new_tokens": 9, "min_new_tokens": 9}
    bare = decoder.generate(PROMPTS, **options)
    monkeypatch.setattr(Session, "judge", judge_all_but_one)
    output = decoder.generate(PROMPTS, **options)
    error = output.traces[1].end.error
    found = re.search(r"BeatError: row 1 has (\d+) tokens and (\d+) scores, wanted one", error)
    assert found is not None and int(found[1]) == int(found[2]) + 1 >= 9
    if on_error == "close":
        assert output.traces[1].end.outcome == "closed" and output.texts[1].endswith(REFUSAL)
    else:
        assert output.traces[1].end.unprotected and output.texts[1] == bare.texts[1]
    for row in (0, 2):
        assert output.traces[row].end.outcome == "released"
        assert output.texts[row] == bare.texts[row]


def poisoned(model, *, row, start):
    calls = []

    def poison(_module, _args, scores):
        calls.append(1)
        if len(calls) > start:
            scores = scores.clone()
            scores[row] = math.nan
        return scores

    return model.lm_head.register_forward_hook(poison)


def test_greedy_scores_that_are_nan_close_the_row_in_our_loop(llama, tokenizer):
    """Greedy picks an id of NaN scores without complaint; no activation shows them."""
    decoder = decoder_for(llama, tokenizer, redirect="refuse")
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    bare = decoder.generate(PROMPTS, **options)
    hook = poisoned(llama, row=1, start=4)
    output = decoder.generate(PROMPTS, **options)
    hook.remove()
    end = output.traces[1].end
    assert end.outcome == "closed" and "NonFiniteError" in end.error
    assert end.released_tokens + end.dropped_tokens == 4
    assert output.texts[1].endswith(REFUSAL)
    for row in (0, 2):
        assert same_row(output.sequences[row], bare.sequences[row])


def test_greedy_scores_that_are_nan_close_the_row_in_a_foreign_loop(llama, tokenizer):
    inputs, decoder = encoded(llama, tokenizer), decoder_for(llama, tokenizer)
    options = {"max_new_tokens": 40, "min_new_tokens": 40}
    bare = llama.generate(**inputs, **options)
    hook = poisoned(llama, row=1, start=4)
    ids, traces = run_bare(decoder, llama, inputs, **options)
    hook.remove()
    width = inputs["input_ids"].shape[1]
    assert tokenizer.decode(ids[1], skip_special_tokens=True).endswith(REFUSAL)
    assert traces[1].end.outcome == "closed"
    assert "row 1 has NaN in its scores before token 4" in traces[1].end.error
    assert torch.equal(ids[1, : width + 4], bare[1, : width + 4])
    for row in (0, 2):
        assert torch.equal(ids[row], bare[row]) and traces[row].end.outcome == "released"


class Normalises(LogitsProcessor):
    def __call__(self, _ids, scores):
        return scores.log_softmax(-1)


def test_log_probabilities_are_refused_though_the_rows_are_as_many(llama, tokenizer):
    """Beams have the rows of as many sequences: their scores tell them apart."""
    inputs = encoded(llama, tokenizer)
    decoder = decoder_for(llama, tokenizer)
    before = len(llama.model.layers[0]._forward_hooks)
    with (
        pytest.raises(UnsupportedError, match="scores are log-probabilities"),
        decoder.processor(**inputs, num_return_sequences=2) as handle,
    ):
        llama.generate(
            **inputs, num_beams=2, logits_processor=[handle.logits_processor], max_new_tokens=4
        )
    with (
        pytest.raises(UnsupportedError, match="scores are log-probabilities"),
        decoder.processor(**inputs) as handle,
    ):
        llama.generate(
            **inputs, logits_processor=[Normalises(), handle.logits_processor], max_new_tokens=4
        )
    assert len(llama.model.layers[0]._forward_hooks) == before
    for trace in handle.traces:
        assert not trace.steps and trace.end.released_tokens == 0
