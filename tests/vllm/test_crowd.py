"""Many requests at once: preempted, in chunks, with common beginnings, aborted by their readers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.testing.models import BOS
from tests.vllm.engines import Consumed, forked, start
from tests.vllm.toys import N_NEW, Toy, prompts_of, scores_of, solo, watched_from

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4


def crowd(toy: Toy) -> tuple[dict, dict, dict]:
    from vllm import SamplingParams

    # 448 positions for eight rows of some 100 each, of which 64 are common.
    llm = start(toy, num_gpu_blocks_override=14)
    seen, engine = Consumed(llm), llm.llm_engine
    draw, waiting, said, aborted = random.Random(1), list(toy.prompts), {}, []
    running: list[str] = []
    params = SamplingParams(temperature=0.0, max_tokens=N_NEW)
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(len(waiting), draw.randrange(4))):
            prompt, name = waiting.pop(0), str(len(toy.prompts) - len(waiting))
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
            running.append(name)
        for one in engine.step():
            if one.finished:
                said[tuple(one.prompt_token_ids)] = list(one.outputs[0].token_ids)
                running.remove(one.request_id)
        if running and len(aborted) < 2 and draw.random() < 0.1:
            aborted.append(running.pop(draw.randrange(len(running))))
            engine.abort_request([aborted[-1]])
    counts = {name: getattr(seen, name) for name in ("n_partial", "n_cached", "n_resumed")}
    return said, dict(seen.scores), counts | {"n_aborted": len(aborted)}


def crowded(toy: Toy) -> Toy:
    """Prompts of which parts are cached: chats, and raw texts whose last 64 tokens are judged."""
    chats = prompts_of(12, common=70, seed=3)
    return replace(toy, prompts=tuple(p if i % 3 else (BOS, *p[2:-9]) for i, p in enumerate(chats)))


def test_every_position_of_a_crowd_is_scored_once_and_decides_as_alone(llama_toy):
    toy = crowded(llama_toy)
    said, consumed, counts = forked(crowd, toy, SAFE_DECODE_BUNDLE=str(toy.bundle))
    assert min(counts.values()) > 0, counts
    bundle = ProbeBundle.load(toy.bundle)
    decoder = SafeDecoder(*toy.loaded(), bundle, redirect="refuse")
    assert len(said) == len(toy.prompts) - counts["n_aborted"]
    worst = 0.0
    for prompt, ids in said.items():
        assert ids == solo(decoder, prompt)[0]
        (whole,) = scores_of(toy, bundle, [[*prompt, *ids]])
        for scores in consumed[prompt]:
            start_at = watched_from(toy, prompt)
            positions = [position for position, _ in scores]
            assert positions == list(range(start_at, start_at + len(positions)))
            own = torch.tensor([score for _, score in scores])
            theirs = whole[start_at : start_at + len(own), 0]
            worst = max(worst, float((own[: len(theirs)] - theirs).abs().max()))
    assert worst < TOLERANCE
