"""Both arms draw the same tokens, in the way that the certificate speaks of."""

from __future__ import annotations

from dataclasses import replace

import torch

from safe_decode.demo.comparison import Comparison
from safe_decode.demo.scenes import DemoPrompt
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.testing.bundles import bundle_for

PROMPTS = [DemoPrompt.own(text) for text in ("a", "lamp", "by the sea", "tell me more")]


def sampled(bundle):
    certificates = tuple(
        replace(
            one,
            envelope=replace(one.envelope, do_sample=True, temperature=0.7, top_p=0.95, top_k=0),
        )
        for one in bundle.certificates
    )
    return replace(bundle, certificates=certificates)


def test_sampled_answers_are_compared_as_they_are_certified(llama, tokenizer):
    bundle = bundle_for(llama, tokenizer, threshold=1e6)
    decoders = {
        name: SafeDecoder(llama, tokenizer, one, redirect="refuse")
        for name, one in {"greedy": bundle, "sampled": sampled(bundle)}.items()
    }
    said = {}
    for name, decoder in decoders.items():
        arena = Comparison(decoder, max_new_tokens=12)
        before = torch.get_rng_state()
        duels = arena.show(PROMPTS)  # raises where flag mode and bare generate differ
        assert torch.equal(torch.get_rng_state(), before)
        assert [duel.bare.tokens for duel in duels] == [duel.guarded.tokens for duel in duels]
        said[name] = [duel.bare.text for duel in duels]
        (trace,) = arena._guarded(PROMPTS[:1]).traces
        assert trace.header.certificate == "valid"
        assert arena.show(PROMPTS)[0].bare.text == said[name][0]
    assert said["greedy"] != said["sampled"]
