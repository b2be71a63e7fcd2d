"""Nothing stays behind: hooks, memory, threads, whatever ends a call."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from transformers import LogitsProcessor

from safe_decode.streaming.events import Released
from safe_decode.testing.bundles import busy_threads, decoder_for, peaks
from tests.laws.test_failure_injection import PROMPTS, At, hooks_of


class Stop(Exception):  # noqa: N818 - a user's own
    pass


def fail():
    raise Stop


def objects():
    gc.collect()
    # By type: asking foreign lazy objects for their class would wake them.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def run_many(model, tokenizer, n_whole, n_cancelled, n_failed):
    decoder = decoder_for(model, tokenizer, redirect="refuse", holdback=0)
    decoder.generate("go", max_new_tokens=3)
    before, threads = objects(), busy_threads()
    for _ in range(n_whole):
        decoder.generate("go", max_new_tokens=3)
    for _ in range(n_cancelled):
        with decoder.stream("go", max_new_tokens=50, min_new_tokens=50) as stream:
            assert isinstance(next(stream), Released)
    for _ in range(n_failed):
        with pytest.raises(Stop):
            decoder.generate("go", max_new_tokens=9, logits_processor=[At(3, fail)])
    assert not hooks_of(model) and busy_threads() == threads
    assert objects() <= before + 8, "tensors stay behind"


def test_calls_leave_no_hook_no_thread_and_no_tensor(llama, tokenizer):
    run_many(llama, tokenizer, 12, 3, 3)


@pytest.mark.slow
def test_a_thousand_calls_leave_nothing(llama, tokenizer):
    run_many(llama, tokenizer, 1000, 50, 50)


def test_a_strangers_forward_in_between_changes_nothing(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="flag")
    alone = decoder.generate(PROMPTS, max_new_tokens=15)
    stop, errors = threading.Event(), []

    def stranger():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    llama(input_ids=torch.full((2, 5), 70))
        except Exception as error:  # shown by the assertion below
            errors.append(error)

    thread = threading.Thread(target=stranger)
    thread.start()
    try:
        beside = decoder.generate(PROMPTS, max_new_tokens=15)
    finally:
        stop.set()
        thread.join()
    assert not errors and beside.texts == alone.texts and peaks(beside) == peaks(alone)


def test_three_sessions_with_unguarded_calls_between_hear_the_same(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="flag")
    ids = torch.full((1, 6), 70)
    heard = []
    for _ in range(3):
        heard.append(peaks(decoder.generate(PROMPTS, max_new_tokens=8)))
        llama.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert heard[0] == heard[1] == heard[2]


def test_nan_from_one_layer_closes_only_its_row_in_a_stream(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="rewind", holdback=0)
    plain = decoder.generate(PROMPTS, max_new_tokens=12)
    calls = []

    def poison(_module, _args, output):
        calls.append(1)
        if len(calls) >= 6:
            output = output.clone()
            output[1] = torch.nan
        return output

    handle = llama.model.layers[1].register_forward_hook(poison)
    ends = {}
    with decoder.stream(PROMPTS, max_new_tokens=12) as stream:
        for event in stream:
            ends[event.row] = event
    handle.remove()
    assert ends[1].finish_reason == "content_filter"
    assert ends[1].trace.end.outcome == "closed" and "NonFinite" in ends[1].trace.end.error
    for row in (0, 2):
        assert ends[row].text == plain.texts[row]


def test_a_probe_on_a_wrong_device_closes_every_row_of_a_stream(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="refuse")

    # As a probe that was moved after it was checked: what it reads is refused, not multiplied.
    object.__setattr__(decoder._probe, "_transposed", decoder._probe._transposed.to("meta"))
    with decoder.stream("go", max_new_tokens=6) as stream:
        end = list(stream)[-1]
    assert end.finish_reason == "content_filter" and end.trace.end.outcome == "closed"
    assert end.token_ids and end.trace.end.released_tokens == 0


class UnForces(LogitsProcessor):
    def __call__(self, _ids, scores):
        wild = torch.full_like(scores, -1.0)
        wild[:, 77] = 5.0
        return wild


def test_a_users_processor_cannot_undo_a_streams_refusal(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="refuse", threshold=-1e9)
    with decoder.stream("go", max_new_tokens=6, logits_processor=[UnForces()]) as stream:
        end = list(stream)[-1]
    assert end.text == decoder.refusal and end.trace.end.outcome == "refused"
