"""What a guarded engine answers, against transformers under the same guard on the same tokens."""

from __future__ import annotations

import pytest
import torch

from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.testing.bundles import REFUSAL
from tests.vllm.engines import Consumed, forked, start
from tests.vllm.toys import N_NEW, Toy, scores_of, solo, watched_from

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4


def answers(toy: Toy) -> tuple[list, dict]:
    from vllm import SamplingParams

    llm = start(toy)
    seen = Consumed(llm)
    outputs = llm.generate(
        [{"prompt_token_ids": list(ids)} for ids in toy.prompts],
        SamplingParams(temperature=0.0, max_tokens=N_NEW),
        use_tqdm=False,
    )
    said = [one.outputs[0] for one in outputs]
    facts = [(list(o.token_ids), o.finish_reason, o.stop_reason, o.text) for o in said]
    return facts, dict(seen.scores)


def test_an_engine_scores_and_decides_as_transformers_does(toy):
    bundle = ProbeBundle.load(toy.bundle)
    facts, consumed = forked(answers, toy, SAFE_DECODE_BUNDLE=str(toy.bundle))
    decoder = SafeDecoder(*toy.loaded(), bundle, redirect="refuse")
    n_tripped, worst = 0, 0.0
    for prompt, (ids, finish, stop_reason, text) in zip(toy.prompts, facts, strict=True):
        wanted, _ = solo(decoder, prompt)
        assert ids == wanted
        tripped = stop_reason == "content_filter"
        n_tripped += tripped
        assert tripped == text.endswith(REFUSAL)
        assert finish == ("stop" if tripped or len(ids) < N_NEW else "length")
        (scores,) = consumed[prompt]
        start = watched_from(toy, prompt)
        (whole,) = scores_of(toy, bundle, [[*prompt, *ids]])
        positions = [position for position, _ in scores]
        assert positions == list(range(start, start + len(positions)))
        assert start + len(positions) >= len(prompt) + len(ids) - 1
        own = torch.tensor([score for _, score in scores])
        worst = max(worst, float((own - whole[start : start + len(own), 0]).abs().max()))
    assert worst < TOLERANCE
    assert 0 < n_tripped < len(toy.prompts)
