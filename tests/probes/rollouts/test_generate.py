"""Rollouts are what `generate` says, however rows are batched and dropped."""

from dataclasses import dataclass

import pytest
import torch

from probes.rollouts.generate import RolloutConfig, rollout
from probes.rollouts.types import Request
from safe_decode.errors import ConfigurationError, DataError, PromptError
from safe_decode.prompts.chat import encode_chat, stop_ids


@dataclass
class Says:
    label: str
    onset_char: int | None = None


def requests(n=7, prefill=None):
    return [
        Request(
            messages=({"role": "user", "content": "word " * (1 + row * 3 % 7)},),
            group=f"g{row}",
            prefill=prefill,
            meta={"row": row},
        )
        for row in range(n)
    ]


def alone(model, tokenizer, request, cap):
    """One row of bare `generate`, without padding or compaction."""
    chat = encode_chat(tokenizer, request.messages, prefill=request.prefill)
    stops = stop_ids(model, tokenizer)
    ids = torch.tensor([chat.ids])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=cap,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )[0, chat.turn_start :].tolist()
    stop = next((i for i, token in enumerate(out) if token in stops), None)
    return tuple(out[:stop]), stop is not None


def ends_often(model, tokenizer):
    """Make the end of the turn likely, so that rows end at different times."""
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight[list(stop_ids(model, tokenizer))] *= 3
    return model


@pytest.mark.parametrize("prefill", [None, "Sure, ü"])
def test_greedy_rollouts_equal_bare_generate(model, tokenizer, prefill):
    ends_often(model, tokenizer)
    config = RolloutConfig(max_new_tokens=30, batch_size=4, compact_every=7)
    rows = rollout(model, tokenizer, requests(prefill=prefill), config=config)
    for request, row in zip(requests(prefill=prefill), rows, strict=True):
        assert (row.response_ids, row.ended) == alone(model, tokenizer, request, 30)
        assert row.response == tokenizer.decode(row.response_ids)
        assert row.prefill_tokens == (0 if prefill is None else 8)
        assert row.response.startswith(prefill or "")
        assert (row.group, row.meta) == (request.group, request.meta)
        assert (row.response_harmful, row.refusal) == (None, None)


def test_rows_end_at_different_times_in_these_tests(llama, tokenizer):
    config = RolloutConfig(max_new_tokens=30, do_sample=True, compact_every=7)
    rows = rollout(ends_often(llama, tokenizer), tokenizer, requests(40), config=config)
    lengths = {len(row.response_ids) for row in rows if row.ended}
    assert len(lengths) > 3
    assert any(not row.ended for row in rows)
    assert all(len(row.response_ids) == 30 for row in rows if not row.ended)


def test_sampling_repeats_with_its_seed_and_leaves_the_global_state(llama, tokenizer):
    def sampled(seed):
        config = RolloutConfig(max_new_tokens=12, do_sample=True, seed=seed, compact_every=5)
        return [row.response_ids for row in rollout(llama, tokenizer, requests(), config=config)]

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = sampled(1)
    assert torch.equal(torch.rand(3), expected)
    assert sampled(1) == first != sampled(2)


def test_verdicts_become_labels(llama, tokenizer):
    verdicts = iter([Says("refusal"), Says("harmful", 3), Says("benign"), Says("broken")])
    heard = []

    def judge(messages, response):
        heard.append((messages[-1]["content"], response))
        return next(verdicts)

    config = RolloutConfig(max_new_tokens=6)
    rows = rollout(llama, tokenizer, requests(4, "Yes: "), judge=judge, config=config)
    assert [row.response_harmful for row in rows] == [False, True, False, None]
    assert [row.refusal for row in rows] == [True, False, False, None]
    assert [row.onset_char for row in rows] == [None, 3, None, None]
    assert [row.meta["label"] for row in rows] == ["refusal", "harmful", "benign", "broken"]
    assert heard == [(row.prompt, row.response) for row in rows]


def test_what_cannot_be_generated_is_refused(llama, tokenizer):
    with pytest.raises(PromptError, match="exceed the model's context of 256"):
        rollout(llama, tokenizer, requests(), config=RolloutConfig(max_new_tokens=250))
    with pytest.raises(DataError, match="the judge says 'bad'"):
        rollout(
            llama,
            tokenizer,
            requests(1),
            judge=lambda *_: Says("bad"),
            config=RolloutConfig(max_new_tokens=2),
        )
    with pytest.raises(ConfigurationError, match="batch_size=0 must be above 0"):
        RolloutConfig(batch_size=0)
