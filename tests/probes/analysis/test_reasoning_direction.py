"""Branches of a query and depths of alignment, against what is computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from probes.analysis.alignment_depth import (
    judging_own_part,
    kl_by_position,
    kl_depth,
    prefilled,
    refusal_by_depth,
)
from probes.analysis.behaviour import words_judge
from probes.analysis.reasoning_direction import Openers, direction_leans
from probes.rollouts.generate import RolloutConfig
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.prompts.chat import encode_chat
from safe_decode.testing.models import tiny_model
from tests.probes.analysis.test_ablation import REQUESTS, asked, said

OPENERS = Openers("No, I", "Yes, I")


def hidden(model, ids):
    with torch.inference_mode():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [state[0, -1].double() for state in states[1:-1]]  # the last one is normed


def distance(one, other):
    return 1 - float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def test_distances_are_those_of_hidden_states(llama, tokenizer):
    request = REQUESTS[0]
    found = list(direction_leans(llama, tokenizer, [request], openers=OPENERS, tokens=2))
    clean, benign = (
        encode_chat(tokenizer, request.messages, prefill=opener).ids
        for opener in (None, OPENERS.benign)
    )
    query = hidden(llama, clean[:-1])  # the last template token alone opens the answer
    for layer in (0, 1):
        states = [hidden(llama, list(ids))[layer] for ids in (clean, benign)]
        raw = next(f for f in found if (f.layer, f.tokens, f.baseline) == (layer, 0, "none"))
        assert raw.benign[0] == pytest.approx(distance(*states), abs=1e-4)
        less = next(f for f in found if (f.layer, f.tokens, f.baseline) == (layer, 0, "query"))
        wanted = distance(*(state - query[layer] for state in states))
        assert less.benign[0] == pytest.approx(wanted, abs=1e-4)
        assert less.lean[0] == pytest.approx(less.malicious[0] - less.benign[0], abs=1e-6)


def test_every_block_token_and_baseline_is_told(llama, tokenizer):
    found = list(direction_leans(llama, tokenizer, REQUESTS, openers=OPENERS, tokens=3))
    assert {f.tokens for f in found} == {0, 1, 2, 3}
    assert {f.layer for f in found} == {0, 1, 2}
    assert all(f.lean[1] <= f.lean[0] <= f.lean[2] for f in found)
    same = Openers("No, I", "No, I")
    for row in direction_leans(llama, tokenizer, REQUESTS, openers=same, tokens=1):
        assert row.lean == (0, 0, 0)
    with pytest.raises(ConfigurationError, match="tokens=0"):
        list(direction_leans(llama, tokenizer, REQUESTS, tokens=0))


def test_divergence_is_that_of_each_position(llama, tokenizer):
    other = tiny_model("llama", seed=1)
    rows = [said("lamp", "a fine lamp"), said("boat", "no")]
    found = kl_by_position(llama, other, tokenizer, rows, positions=8)
    assert found.shape == (2, 8)
    assert np.isnan(found[1, 2:]).all()
    assert np.allclose(kl_by_position(llama, llama, tokenizer, rows, positions=8)[0], 0, atol=1e-5)
    ids = encode_chat(tokenizer, rows[0].messages, prefill="a fine lamp")
    with torch.inference_mode():
        p, q = (m(torch.tensor([ids.ids])).logits[0].log_softmax(-1) for m in (llama, other))
    at = ids.turn_start + 3 - 1
    wanted = float((p[at].exp() * (p[at] - q[at])).sum())
    assert found[0, 3] == pytest.approx(wanted, rel=1e-3)
    summary = kl_depth(found)
    assert summary.n[:3] == (2, 2, 1)
    assert summary.first_share == pytest.approx(sum(summary.mean[:5]) / sum(summary.mean))
    with pytest.raises(DataError, match="no response reaches token 6"):
        kl_depth(found[1:])


def test_answers_are_begun_by_tokens_and_short_ones_left_out(llama, tokenizer):
    requests = [asked("lamp"), asked("boat")]
    answers = [said("lamp", "break it"), said("boat", "no")]
    assert [r.prefill for r in prefilled(tokenizer, requests, answers, 0)] == [None, None]
    assert [r.prefill for r in prefilled(tokenizer, requests, answers, 4)] == ["brea"]
    config = RolloutConfig(max_new_tokens=4)
    words = words_judge(harmful_prompts=True)

    def judge(begun):
        return judging_own_part(words, begun)

    found = dict(refusal_by_depth(llama, tokenizer, requests, answers, (0, 4, 99), judge, config))
    assert {depth: outcomes.n for depth, outcomes in found.items()} == {0: 2, 4: 1}


def test_only_what_was_added_is_judged():
    begun = [replace(asked("lamp"), prefill="Sure, here is how. ")]
    words = words_judge(harmful_prompts=True)
    text = "Sure, here is how. No, I cannot help."
    assert words(begun[0].messages, "I cannot help. " + text).label == "refusal"
    long = replace(begun[0], prefill="Sure. " * 60)
    own = judging_own_part(words, [long])
    assert own(long.messages, long.prefill + "No, I cannot help.").label == "refusal"
    assert words(long.messages, long.prefill + "No, I cannot help.").label != "refusal"
