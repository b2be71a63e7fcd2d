"""Calls that are refused or fail while somebody waits for their text: every wait ends."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from safe_decode.errors import (
    CertificateError,
    ConfigurationError,
    PromptError,
    UnsupportedError,
)
from safe_decode.policy.policy import RequestPolicy
from safe_decode.testing.bundles import busy_threads, decoder_for
from tests.laws.test_failure_injection import hooks_of
from tests.streaming.test_reader import wait_until


class Interrupts(StoppingCriteria):
    def __call__(self, _ids, _scores, **_):
        raise KeyboardInterrupt


REFUSED = {
    "an option": ({"penalty_alpha": 0.6, "top_k": 4}, UnsupportedError),
    "an unknown option": ({"nonsense": 1}, UnsupportedError),
    "an empty prompt": ({"prompts": ""}, PromptError),
    "no prompt": ({"prompts": None}, PromptError),
    "two forms of a prompt": ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, PromptError),
    "a prompt too long": ({"prompts": "a" * 300}, PromptError),
    "two rows": ({"prompts": ["a", "b"]}, UnsupportedError),
    "two sequences": ({"num_return_sequences": 2, "do_sample": True}, UnsupportedError),
    "beams": ({"num_beams": 2}, UnsupportedError),
    "a policy": ({"policy": RequestPolicy(alpha=0.123)}, CertificateError),
    "too many seeds": ({"seed": [1, 2]}, ConfigurationError),
    "the envelope": ({"max_new_tokens": 200}, CertificateError),
    "transformers": ({"max_new_tokens": -1}, ValueError),
    "an interrupt": ({"stopping_criteria": [Interrupts()]}, KeyboardInterrupt),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_streamer_is_ended_however_the_call_ends(llama, tokenizer, case):
    """Its reader is another thread, which would wait forever."""
    given, error = REFUSED[case]
    decoder = decoder_for(llama, tokenizer, strict=True)
    # A queue that is not ended raises `queue.Empty` here.
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=0.1)
    with pytest.raises(error):
        decoder.generate(**{"prompts": "go", "max_new_tokens": 4, **given}, streamer=streamer)
    assert list(streamer) == [""] and not hooks_of(llama)


# A stream has rows, and raises what comes while it runs.
NO_REFUSALS_OF_A_STREAM = {"two rows", "two sequences", "an interrupt"}


@pytest.mark.parametrize("case", sorted(REFUSED.keys() - NO_REFUSALS_OF_A_STREAM) + ["a streamer"])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_refused_up_front_leaves_no_thread_and_no_reader_waits(
    llama, tokenizer, case, is_async
):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=0.1)
    given, error = REFUSED.get(case, ({"streamer": streamer}, UnsupportedError))
    decoder, before = decoder_for(llama, tokenizer, strict=True), busy_threads()

    async def read(call):
        async with decoder.astream(**call) as stream:
            return [event async for event in stream]

    call = {"prompts": "go", "max_new_tokens": 4, **given}
    with pytest.raises(error):
        asyncio.run(read(call)) if is_async else list(decoder.stream(**call))
    wait_until(lambda: busy_threads() == before and not hooks_of(llama))
    assert case != "a streamer" or list(streamer) == [""]
