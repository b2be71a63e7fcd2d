"""What a reader of a stream sees: the same words as without one, never too early."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
import torch
from transformers import LogitsProcessor

from safe_decode.errors import ConfigurationError, PromptError, UnsupportedError
from safe_decode.policy.policy import RequestPolicy
from safe_decode.prompts.batch import from_prompts
from safe_decode.streaming.events import Ended, GuardText, Released, Tripped
from safe_decode.testing.bundles import (
    OPENER,
    REFUSAL,
    busy_threads,
    decoder_for,
    peaks,
    threshold_between,
)
from safe_decode.testing.models import EOS, tiny_model
from tests.laws.test_failure_injection import hooks_of

PROMPTS = ["hello", "what is it?", "tell me a long story", "go", "abc"]


@pytest.fixture(scope="module")
def shared():
    return tiny_model("llama")


def middle(model, tokenizer, prompts=PROMPTS, **options):
    flagged = decoder_for(model, tokenizer, redirect="flag").generate(prompts, **options)
    return threshold_between(peaks(flagged))


def by_row(events, n_rows):
    return [[event for event in events if event.row == row] for row in range(n_rows)]


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Released | GuardText))


# --- 3. Stream law


@pytest.mark.parametrize(
    ("redirect", "holdback"),
    [("refuse", 0), ("refuse", 7), ("rewind", 0), ("rewind", 5), ("stop", 2), ("flag", 3)],
)
def test_streaming_and_not_give_the_same_tokens_and_traces(shared, tokenizer, redirect, holdback):
    options = {"max_new_tokens": 60, "eos_token_id": list(range(100, 104))}
    decoder = decoder_for(
        shared,
        tokenizer,
        redirect=redirect,
        holdback=holdback,
        threshold=middle(shared, tokenizer, **options),
    )
    whole = decoder.generate(PROMPTS, **options)
    assert {trace.tripped for trace in whole.traces} == {True, False}
    width = from_prompts(decoder.tokenizer, PROMPTS, None, decoder.device).input_ids.shape[1]
    for row, events in enumerate(by_row(list(decoder.stream(PROMPTS, **options)), len(PROMPTS))):
        end = events[-1]
        assert isinstance(end, Ended) and sum(isinstance(e, Ended) for e in events) == 1
        assert end.text == whole.texts[row] == text_of(events)
        assert end.trace == whole.traces[row]
        ids = [i for e in events if isinstance(e, Released | GuardText) for i in e.token_ids]
        assert tuple(ids) == end.token_ids
        stands = whole.sequences[row, width : width + len(ids)].tolist()
        assert stands == ids
        tripped = [event for event in events if isinstance(event, Tripped)]
        assert bool(tripped) == (whole.traces[row].tripped and redirect != "flag")
        assert (end.finish_reason == "content_filter") == (
            end.trace.end.outcome in ("refused", "stopped")
        )
        for event in tripped:
            assert event.redirect == redirect and event.error is None


@pytest.mark.parametrize("holdback", [0, 1, 5])
def test_no_token_is_shown_before_the_k_after_it_are_judged(shared, tokenizer, holdback):
    decoder = decoder_for(shared, tokenizer, redirect="refuse", holdback=holdback)
    forwards, seen = [], []
    spy = shared.register_forward_hook(lambda *_: forwards.append(1))
    call = decoder._call(
        "go",
        input_ids=None,
        attention_mask=None,
        prefill=None,
        policy=None,
        seed=None,
        options={"max_new_tokens": 20, "min_new_tokens": 20},
    )
    from safe_decode.engines.transformers.call_spec import StreamSink

    call.run(StreamSink(lambda event: seen.append((len(forwards), event))))
    spy.remove()
    shown = 0
    for n_forwards, event in seen:
        if isinstance(event, Released):
            shown += len(event.token_ids)
            # The first forward reads the prompt; forward n + 1 judges token n.
            judged = n_forwards - 1
            assert shown <= judged - holdback or judged == 20
    assert shown == 20
    first = next(n for n, event in seen if isinstance(event, Released))
    assert first == holdback + 2, "the first token is out as soon as it may be"


def test_a_seeded_row_does_not_depend_on_its_batch(shared, tokenizer):
    decoder = decoder_for(shared, tokenizer)
    options = {"max_new_tokens": 25, "do_sample": True, "temperature": 0.9, "top_k": 40}
    together = decoder.generate(PROMPTS, seed=[5, 6, 7, 8, 9], **options)
    before = torch.get_rng_state()
    for row in (1, 3):
        alone = decoder.generate(PROMPTS[row], seed=5 + row, **options)
        assert alone.texts[0] == together.texts[row]
        with decoder.stream(PROMPTS[row], seed=5 + row, **options) as stream:
            assert list(stream)[-1].text == together.texts[row]
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    several = decoder.generate("go", seed=8, num_return_sequences=3, **options)
    assert several.texts[0] == together.texts[3] and len(set(several.texts)) == 3


def test_seeded_draws_follow_the_probabilities():
    from safe_decode.session.row_rng import RowRNG

    draws = RowRNG([1, 2], torch.device("cpu"))
    scores = torch.log(torch.tensor([[0.5, 0.0, 0.2, 0.3], [0.0, 0.0, 0.0, 1.0]]))
    counts = torch.zeros(2, 4)
    for _ in range(4000):
        forced = draws.forced(scores)
        assert (forced == 0).sum().item() == 2
        counts += (forced == 0).float()
    assert counts[0, 1] == 0 and counts[1, 3] == 4000
    assert torch.allclose(counts[0] / 4000, torch.tensor([0.5, 0.0, 0.2, 0.3]), atol=0.03)


# --- words and characters


def say(*tokens):
    """A processor that dictates what the model says."""

    class Dictates(LogitsProcessor):
        def __init__(self):
            self.step = 0

        def __call__(self, _ids, scores):
            wanted = tokens[self.step] if self.step < len(tokens) else EOS
            self.step += 1
            new = torch.full_like(scores, -torch.inf)
            new[:, wanted] = 0.0
            return new

    return Dictates()


def test_a_split_character_comes_whole(shared, tokenizer):
    text = "aé€🙂b"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 1 + 2 + 3 + 4 + 1
    decoder = decoder_for(shared, tokenizer, holdback=0)
    with decoder.stream("go", max_new_tokens=30, logits_processor=[say(*ids)]) as stream:
        events = list(stream)
    parts = [event.text for event in events if isinstance(event, Released) and event.text]
    assert parts == ["a", "é", "€", "🙂", "b"] and events[-1].text == text
    assert events[-1].finish_reason == "stop"


def test_a_character_cut_by_the_end_shows_so(shared, tokenizer):
    ids = tokenizer.encode("a🙂", add_special_tokens=False)[:-1]
    decoder = decoder_for(shared, tokenizer, holdback=0)
    options = {"max_new_tokens": len(ids)}
    whole = decoder.generate("go", logits_processor=[say(*ids)], **options).texts[0]
    events = list(decoder.stream("go", logits_processor=[say(*ids)], **options))
    assert events[-1].text == text_of(events) == whole and whole.startswith("a\ufffd")
    assert events[-1].finish_reason == "length"


@pytest.mark.parametrize("includes_stop", [True, False])
def test_the_beginning_of_a_stop_string_is_held(shared, tokenizer, includes_stop):
    ids = tokenizer.encode("one ENough two END three", add_special_tokens=False)
    decoder = decoder_for(shared, tokenizer, holdback=0)
    options = {"max_new_tokens": 30, "stop_strings": ["END", "zz"]}
    whole = decoder.generate("go", logits_processor=[say(*ids)], **options).texts[0]
    events = list(
        decoder.stream("go", logits_processor=[say(*ids)], includes_stop=includes_stop, **options)
    )
    end = events[-1]
    assert whole == "one ENough two END" and end.stop_string == "END"
    assert end.text == (whole if includes_stop else "one ENough two ")
    assert tokenizer.decode(list(end.token_ids)) == end.text and end.finish_reason == "stop"
    shown = ""
    for event in events[:-1]:
        shown += event.text
        assert shown in (whole, whole.removesuffix("END")[: len(shown)])
    assert "ENo" in shown


# --- cancellation


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def test_cancel_ends_the_call_and_the_last_event_says_so(shared, tokenizer):
    decoder = decoder_for(shared, tokenizer, holdback=0)
    with decoder.stream("go", max_new_tokens=200, min_new_tokens=200) as stream:
        first = next(stream)
        stream.cancel()
        rest = list(stream)
    end = rest[-1]
    assert isinstance(first, Released) and isinstance(end, Ended)
    assert end.finish_reason == "cancelled" and end.trace.end.outcome == "cancelled"
    shown = text_of([first, *rest])
    assert end.text == shown and len(end.token_ids) < 200
    assert end.trace.end.released_tokens == len(end.token_ids)
    assert not hooks_of(shared)


@pytest.mark.parametrize("how", ["break", "raise", "forget"])
def test_a_stream_that_is_left_leaves_nothing_behind(shared, tokenizer, how):
    decoder = decoder_for(shared, tokenizer, holdback=0)
    before = busy_threads()
    stream = decoder.stream("go", max_new_tokens=200, min_new_tokens=200)
    if how == "forget":
        next(stream)
        del stream
        gc.collect()
    elif how == "break":
        with stream:
            for _ in stream:
                break
    else:
        with pytest.raises(ZeroDivisionError), stream:
            for _ in stream:
                raise ZeroDivisionError("the reader's own")
    wait_until(lambda: not hooks_of(shared) and busy_threads() == before)


def test_an_error_of_the_call_reaches_the_reader(shared, tokenizer):
    class Fails(LogitsProcessor):
        def __call__(self, _ids, _scores):
            raise ZeroDivisionError("user code")

    decoder = decoder_for(shared, tokenizer)
    with (
        pytest.raises(ZeroDivisionError, match="user code"),
        decoder.stream("go", max_new_tokens=9, logits_processor=[Fails()]) as stream,
    ):
        list(stream)
    assert not hooks_of(shared)


def test_bad_input_is_refused_before_anything_runs(shared, tokenizer):
    decoder = decoder_for(shared, tokenizer)
    for call, error in (
        (lambda: decoder.stream(""), PromptError),
        (lambda: decoder.stream("go", guidance_scale=2.0), UnsupportedError),
        (lambda: decoder.stream(["a", "b"], seed=[1]), ConfigurationError),
        (lambda: decoder.stream("a", policy=RequestPolicy(alpha=0.123)), Exception),
    ):
        with pytest.raises(error):
            call()


# --- asyncio


def test_the_async_twin_gives_the_same_events(shared, tokenizer):
    decoder = decoder_for(shared, tokenizer, threshold=middle(shared, tokenizer, max_new_tokens=30))

    async def read(prompt):
        async with decoder.astream(prompt, max_new_tokens=30) as stream:
            return [event async for event in stream]

    async def both():
        return await asyncio.gather(read("hello"), read("tell me a long story"))

    for prompt, events in zip(("hello", "tell me a long story"), asyncio.run(both()), strict=True):
        assert events == list(decoder.stream(prompt, max_new_tokens=30))
    assert not hooks_of(shared)


def test_cancelling_the_reading_task_cancels_the_call(shared, tokenizer):
    decoder = decoder_for(shared, tokenizer, holdback=0)
    seen = []

    async def read():
        async with decoder.astream("go", max_new_tokens=200, min_new_tokens=200) as stream:
            async for event in stream:
                seen.append(event)

    async def main():
        task = asyncio.create_task(read())
        while len(seen) < 3:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not hooks_of(shared) and len(seen) < 200


# --- per-row policy


def test_rows_of_one_batch_have_their_own_policy(shared, tokenizer):
    policies = [
        RequestPolicy(redirect="flag"),
        RequestPolicy(redirect="refuse", refusal="No, thank you."),
        RequestPolicy(is_structured=True),
        RequestPolicy(redirect="refuse", holdback_tokens=9),
        None,
    ]
    decoder = decoder_for(shared, tokenizer, redirect="rewind", threshold=-1e9, holdback=0)
    output = decoder.generate(PROMPTS, policy=policies, max_new_tokens=40)
    bare = decoder_for(shared, tokenizer).generate(PROMPTS, max_new_tokens=40)
    assert [trace.header.redirect for trace in output.traces] == [
        "flag",
        "refuse",
        "stop",
        "refuse",
        "rewind",
    ]
    assert output.texts[:4] == [bare.texts[0], "No, thank you.", "", REFUSAL]
    assert output.traces[0].end.unprotected and not output.traces[1].end.unprotected
    assert output.traces[3].header.holdback_tokens == 9
    events = by_row(list(decoder.stream(PROMPTS, policy=policies, max_new_tokens=40)), 5)
    assert [row[-1].text for row in events] == output.texts


def test_a_policy_is_read_from_metadata_and_never_from_text():
    policy = RequestPolicy.from_metadata({"alpha": 0.5, "redirect": "stop", "refusal": None})
    assert policy == RequestPolicy(alpha=0.5, redirect="stop")
    for metadata, words in (
        ({"threshold": 3.0}, "'threshold'"),
        ({"redirect": "shout"}, "shout"),
        ({"holdback_tokens": True}, "holdback_tokens=True"),
        ({"holdback_tokens": -1}, "holdback_tokens=-1"),
        ({"refusal": " "}, "refusal"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            RequestPolicy.from_metadata(metadata)


def test_an_opener_is_shown_with_the_first_word_after_it(shared, tokenizer):
    flagged = decoder_for(shared, tokenizer, redirect="flag")
    top = max(s.statistic for s in flagged.generate("go", max_new_tokens=100).traces[0].steps)
    decoder = decoder_for(shared, tokenizer, redirect="rewind", threshold=top - 1e-3)
    events = list(decoder.stream("go", max_new_tokens=100))
    openers = [i for i, e in enumerate(events) if isinstance(e, GuardText) and e.kind == "opener"]
    assert openers and OPENER in events[openers[0]].text
    for i in openers:
        assert isinstance(events[i + 1], Released) and events[i + 1].attempt > 0


def test_a_stream_may_choose_its_redirect_as_a_call_may(shared, tokenizer):
    options = {"max_new_tokens": 60, "redirect": "stop"}
    threshold = middle(shared, tokenizer, max_new_tokens=60)
    decoder = decoder_for(shared, tokenizer, redirect="refuse", threshold=threshold)
    whole = decoder.generate(PROMPTS, **options)
    outcomes = [trace.end.outcome for trace in whole.traces]
    assert set(outcomes) == {"stopped", "released"}
    with decoder.stream(PROMPTS, **options) as stream:
        ends = sorted((e for e in stream if isinstance(e, Ended)), key=lambda end: end.row)
    assert [end.trace.end.outcome for end in ends] == outcomes
    assert [end.text for end in ends] == whole.texts
