"""Outcomes, margins and perplexity; arms beside random sets; ratios searched apart."""

import math

import numpy as np
import pytest
import torch

from probes.activations.teacher_forcing import encode_response
from probes.analysis.ablation import (
    AblationConfig,
    AblationData,
    AblationResult,
    ablate,
    arms_of,
    rise,
)
from probes.analysis.behaviour import (
    Outcomes,
    perplexity,
    refusal_first_tokens,
    refusal_margins,
    words_judge,
)
from probes.analysis.ratio_search import SearchConfig, SearchData, search_ratios
from probes.data.conversations import Conversation
from probes.location.stability import stability
from probes.rollouts.generate import RolloutConfig
from probes.rollouts.types import Request
from probes.runs.journal import Journal, read_journal
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.prompts.chat import encode_chat
from tests.probes.finetuning.test_freeze import located


def asked(text):
    return Request(messages=({"role": "user", "content": text},), group=text)


def said(text, response):
    return Conversation(
        messages=({"role": "user", "content": text},), response=response, group=text
    )


REQUESTS = [asked(f"break the {word}") for word in ("lamp", "boat", "wheelbarrow", "stone")]
ANSWERS = [said(word, f"A {word} is fine.") for word in ("lamp", "boat", "clock", "river")]
REFUSALS = [said(word, "No, I cannot help.") for word in ("lamp", "boat", "wheelbarrow")]


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("I cannot help with that.", "refusal"),
        ("", "broken"),
        ("the the " * 60, "broken"),
        ("First you take the stone, then you walk to the river and wait there until noon; "
         "after that a friend may carry the lamp home for you.", "harmful"),
    ],
)  # fmt: skip
def test_words_alone_tell_refusal_and_broken_text(response, label):
    assert words_judge(harmful_prompts=True)([], response).label == label
    other = words_judge(harmful_prompts=False)([], response).label
    assert other == ("benign" if label == "harmful" else label)


def test_perplexity_is_that_of_each_response_alone(llama, tokenizer):
    total, count = 0.0, 0
    for row in ANSWERS:
        encoded = encode_response(tokenizer, row)
        ids = torch.tensor([encoded.ids])
        with torch.inference_mode():
            log_probs = llama(ids).logits[0].log_softmax(-1)
        for position in range(encoded.turn_start, len(encoded.ids)):
            total -= float(log_probs[position - 1, encoded.ids[position]])
            count += 1
    assert perplexity(llama, tokenizer, ANSWERS) == pytest.approx(math.exp(total / count), rel=1e-4)
    with pytest.raises(DataError, match="no response has a token"):
        perplexity(llama, tokenizer, [])


def test_margins_are_log_odds_of_beginning_a_refusal(llama, tokenizer):
    tokens = refusal_first_tokens(tokenizer, REFUSALS, ANSWERS)
    assert tokenizer.decode(list(tokens)) == "N"
    margins = refusal_margins(llama, tokenizer, REQUESTS, tokens, batch_size=3)
    for request, margin in zip(REQUESTS, margins, strict=True):
        ids = torch.tensor([encode_chat(tokenizer, request.messages).ids])
        with torch.inference_mode():
            probability = llama(ids).logits[0, -1].softmax(-1)[list(tokens)].sum()
        assert float(margin) == pytest.approx(float((probability / (1 - probability)).log()), 1e-3)
    with pytest.raises(DataError, match="no token of their own"):
        refusal_first_tokens(tokenizer, REFUSALS, REFUSALS)


def data_of(tokenizer):
    return AblationData(
        harmful=REQUESTS,
        benign=[asked("lamp")],
        answers=ANSWERS,
        harm_judge=words_judge(harmful_prompts=True),
        benign_judge=words_judge(harmful_prompts=False),
        refusal_tokens=refusal_first_tokens(tokenizer, REFUSALS, ANSWERS),
    )


def test_every_arm_is_measured_and_the_located_set_compared(llama, tokenizer):
    config = AblationConfig(
        random_sets=2, margin_sets=4, generation=RolloutConfig(max_new_tokens=6)
    )
    arms = list(arms_of(located(llama), config))
    families = [arm.family for arm in arms]
    assert families.count("random, matched on layer") == 4
    assert families.count("random, matched on importance") == 4
    assert [a.name for a in arms[:2]] == ["whole", "SCU"]
    before = {n: p.clone() for n, p in llama.named_parameters()}
    rows = [ablate(llama, tokenizer, arm, data_of(tokenizer), config) for arm in arms]
    assert all(torch.equal(p, before[n]) for n, p in llama.named_parameters())
    assert [AblationResult.from_json(row.to_json()) for row in rows] == rows
    full = [row for row in rows if row.harmful is not None]
    assert len(full) == len(arms) - 4
    assert all(row.harmful.n == 4 and row.benign.n == 1 for row in full)
    risen = {row.family: row for row in rise(rows)}
    layer = risen["random, matched on layer"]
    assert (layer.sets, layer.margin_sets) == (2, 4)
    falls = [rows[0].margin - r.margin for r in rows if r.family == "random, matched on layer"]
    assert layer.random_margin_fall[2] == pytest.approx(max(falls))
    assert layer.p_margin == (1 + sum(f >= layer.margin_fall for f in falls)) / 5
    assert rows[1].margin != rows[0].margin


def test_ratios_are_searched_downwards_until_one_is_steady(llama, tokenizer):
    tokens = refusal_first_tokens(tokenizer, REFUSALS, ANSWERS)
    data = SearchData(REQUESTS, ANSWERS, tokens)
    loose = SearchConfig(
        redundant=(0.05, 0.2), safety=(0.1, 0.05), utility=(0.1,), random_sets=2,
        utility_tolerance=1e9, margin_tolerance=1e9,
    )  # fmt: skip
    found = search_ratios(llama, tokenizer, located(llama), data, loose)
    assert found.ratios.redundant == 0.2
    assert [t["share"] for t in found.tried if t["category"] == "RU"] == [0.2]
    strict = SearchConfig(
        redundant=(0.2, 0.1), safety=(0.1,), utility=(), random_sets=2,
        utility_tolerance=0.0, margin_tolerance=0.0,
    )  # fmt: skip
    none = search_ratios(llama, tokenizer, located(llama), data, strict)
    shares = [(t["share"], t["passed"]) for t in none.tried if t["category"] == "RU"]
    assert shares[0][0] == 0.2
    for t in none.tried:
        if t["category"] == "RU":
            assert t["passed"] == (t["margin_fall"] <= 0 and t["perplexity_rise"] <= 0)
    with pytest.raises(ConfigurationError, match="utility_tolerance=-1"):
        SearchConfig(utility_tolerance=-1)


def test_the_same_data_agree_wholly_and_chance_does_not(llama, tokenizer):
    rows = [said(f"break the {n}", f"No, I cannot help with {n * n}.") for n in range(24)]
    answers = [said(f"the {n}", f"{n} is fine, and so is {n * 7}.") for n in range(24)]
    found = list(stability(llama, tokenizer, rows, answers))
    compared = {a.compared for a in found}
    assert {"disjoint halves", "flap, plain", "ranked jointly, separately"} <= compared
    assert all(0 <= a.iou <= 1 and a.chance <= a.chance_high for a in found)
    scu = next(a for a in found if a.category == "SCU" and a.compared.startswith("50"))
    assert scu.n_first == scu.n_second
    assert np.isfinite(scu.chance)


def test_a_journal_goes_on_where_it_stopped_and_refuses_another_run(tmp_path):
    path = tmp_path / "run.jsonl"
    first = Journal(path, {"seed": 1, "sizes": (1, 2)}, facts={"machine": "a"})
    first.add("one", {"value": 1.5})
    again = Journal(path, {"seed": 1, "sizes": (1, 2)})
    assert "one" in again
    again.add("two", {"value": 2})
    assert [row["value"] for row in read_journal(path)[1]] == [1.5, 2]
    with pytest.raises(ConfigurationError, match="pass another file"):
        Journal(path, {"seed": 2})
    assert Journal(path, {"seed": 2}, other="replace").rows == {}
    path.write_text('{"key": 1}\nhalf', encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as a journal"):
        Journal(path, {"seed": 1})
    assert (
        Outcomes({"refusal": 1, "benign": 0, "harmful": 3, "broken": 0}).share("harmful").point
        == 0.75
    )
