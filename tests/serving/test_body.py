"""How requests are read: beside the event loop, in bounded work, whatever they hold."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
from starlette.testclient import TestClient

from safe_decode.errors import PromptError
from safe_decode.prompts import chat, turn_headers
from safe_decode.prompts.plain_text import controls_of, text_ids
from safe_decode.serving.app import create_app
from safe_decode.serving.requests.body import BodyReader, read_ask
from safe_decode.serving.schemas.errors import ApiError
from safe_decode.serving.schemas.requests import ChatCompletionRequest, CompletionRequest
from safe_decode.testing.models import byte_tokenizer
from tests.servers import MODEL, settings_of, staged_engine
from tests.staged import CALM

TURN = [{"role": "user", "content": "a"}]
JSON = "application/json"


def crowded(n_tokens):
    """A tokenizer of its own with so many control tokens."""
    tokenizer = byte_tokenizer()
    added = [f"<|extra_{i}|>" for i in range(n_tokens)]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


@pytest.fixture
def counted(monkeypatch):
    """A tokenizer that counts how often it is asked for its added tokens, a slow question."""
    tokenizer, calls = crowded(50), []
    real = type(tokenizer).added_tokens_decoder

    def told(self):
        calls.append(None)
        return real.fget(self)

    monkeypatch.setattr(type(tokenizer), "added_tokens_decoder", property(told))
    return tokenizer, calls


def test_control_tokens_are_asked_for_once_a_text_and_not_once_an_id(counted):
    tokenizer, calls = counted
    asked = []
    for text in ("a", "a b " * 2_000):
        calls.clear()
        text_ids(tokenizer, text)
        asked.append(len(calls))
    assert asked[0] == asked[1] == 1
    for n_messages in (1, 60):
        calls.clear()
        turns = [*TURN, {"role": "assistant", "content": "b"}] * n_messages
        chat.encode_chat(tokenizer, [*turns, *TURN], prefill="a " * n_messages)
        asked.append(len(calls))
    assert asked[2] == asked[3]


def test_control_tokens_added_later_are_seen():
    tokenizer = crowded(0)
    before = controls_of(tokenizer)
    word = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False)[0])
    size = len(tokenizer)
    # A word that was there already: the vocabulary is as large as before.
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    assert len(tokenizer) == size
    assert controls_of(tokenizer).ids - before.ids == {tokenizer.convert_tokens_to_ids(word)}
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    assert controls_of(tokenizer).spelt_in(["x<|new|><|new|>", "x"]) == [["<|new|>"] * 2, []]
    ids = chat.encode_chat(tokenizer, [{"role": "user", "content": "x<|new|>"}]).ids
    assert tokenizer.convert_tokens_to_ids("<|new|>") not in ids


def test_messages_without_control_tokens_are_encoded_as_transformers_does():
    """Its own cleaning is left out for them, since it takes seconds of one call."""
    tokenizer = crowded(20)
    for text in ("a b", "<|", "<|extra_", "|>é😀", "\na", "a<|user|>b", "x<|extra_7|>"):
        turns = [{"role": "user", "content": text}]
        wanted = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
        assert list(chat.encode_chat(tokenizer, turns).ids) == wanted


def test_what_would_be_cleaned_for_seconds_is_refused_by_name():
    tokenizer = crowded(2_000)
    long = "<|" * 40_000
    assert chat.encode_chat(tokenizer, [{"role": "user", "content": long[:200]}]).ids
    for text, word in ((long + "<|extra_7|>", "shorten"), ("<|extra_7|>" * 300, "300 times")):
        began = time.perf_counter()
        with pytest.raises(PromptError, match=word):
            chat.encode_chat(tokenizer, [{"role": "user", "content": text}])
        assert time.perf_counter() - began < 5


def test_threads_that_encode_differently_do_not_swap_their_ways():
    """A tokenizer keeps how it treats control tokens; one thread must not set it for another."""
    tokenizer = crowded(5)
    wrong, until = [], time.monotonic() + 1.5
    marked = chat.encode_chat(tokenizer, TURN).ids

    def plainly():
        while time.monotonic() < until:
            try:
                text_ids(tokenizer, "a<|extra_3|>" * 20)
            except (PromptError, RuntimeError) as error:
                wrong.append(error)

    def by_template():
        while time.monotonic() < until:
            if chat.encode_chat(tokenizer, TURN).ids != marked:
                wrong.append("the template's own control tokens became text")

    threads = [threading.Thread(target=run) for run in (plainly, by_template)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong[:1] == []


def test_runs_of_ids_are_found_where_a_plain_search_finds_them():
    for ids in ([1, 1, 2, 1, 2, 3], [1] * 9, [3, 1, 2], [], [2, 1, 2, 1, 2]):
        for wanted in ([1], [1, 2], [1, 2, 3], [1, 1], [2, 1, 2]):
            places = [
                i for i in range(len(ids) - len(wanted) + 1) if ids[i : i + len(wanted)] == wanted
            ]
            assert turn_headers._find_first(ids, wanted, 0) == (places[0] if places else -1)
            assert turn_headers._find_last(ids, wanted) == (places[-1] if places else -1)


# Bodies.


def read(kind, body):
    raw = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    return read_ask(kind, raw, JSON)


HOSTILE = {
    "keys": (
        ChatCompletionRequest,
        {"model": "m", "messages": TURN, **{f"k{i}": 0 for i in range(60_000)}},
    ),
    "inner keys": (
        ChatCompletionRequest,
        {"model": "m", "messages": [{**TURN[0], **{f"k{i}": 0 for i in range(60_000)}}]},
    ),
    "stops": (ChatCompletionRequest, {"model": "m", "messages": TURN, "stop": ["a"] * 200_000}),
    "bias": (
        ChatCompletionRequest,
        {"model": "m", "messages": TURN, "logit_bias": {str(i): 1 for i in range(60_000)}},
    ),
    "parts": (
        ChatCompletionRequest,
        {
            "model": "m",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 256}] * 100,
        },
    ),
    "lists": (CompletionRequest, {"model": "m", "prompt": [[]] * 300_000}),
    "ids": (CompletionRequest, {"model": "m", "prompt": [1] * 400_000}),
    "strings": (CompletionRequest, {"model": "m", "prompt": ["a"] * 200_000}),
    "wrong ids": (CompletionRequest, {"model": "m", "prompt": [[True] * 180_000]}),
    "wrong stops": (ChatCompletionRequest, {"model": "m", "messages": TURN, "stop": [0] * 180_000}),
    "deep": (ChatCompletionRequest, b"[" * 900_000),
    "open string": (ChatCompletionRequest, b'{"model":"' + b'\\"' * 400_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_takes_little_processor_time(name):
    """Work is counted in the processor's time of this thread, with much to spare."""
    kind, body = HOSTILE[name]
    raw = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    began = time.thread_time()
    with pytest.raises(Exception) as refused:  # noqa: PT011 - which of two is not the point
        read_ask(kind, raw, JSON)
    assert time.thread_time() - began < 0.25
    assert isinstance(refused.value, ApiError) or len(refused.value.errors()) == 1


def test_what_is_legal_is_read():
    most = read(CompletionRequest, {"model": "m", "prompt": [7] * 200_000})
    assert len(most.prompt) == 200_000
    talk = [{"role": "user", "content": 'a, b, "c" [d] {e}' * 100}] * 512
    assert len(read(ChatCompletionRequest, {"model": "m", "messages": talk}).messages) == 512
    # Structure inside strings is text.
    read(
        ChatCompletionRequest,
        {"model": "m", "messages": [{"role": "user", "content": '[{",\\' * 100_000}]},
    )


@pytest.mark.parametrize("kind", ["", "text/plain", "application/jsonx", "multipart/form-data"])
def test_what_is_not_called_json_is_not_read(kind):
    """A page elsewhere can make a browser send plain text here without asking first."""
    with pytest.raises(ApiError, match="content type"):
        read_ask(ChatCompletionRequest, json.dumps({"model": "m", "messages": TURN}).encode(), kind)
    assert read_ask(
        ChatCompletionRequest,
        json.dumps({"model": "m", "messages": TURN}).encode(),
        "application/json; charset=utf-8",
    )


def test_too_many_answers_are_refused_before_anything_is_encoded(monkeypatch):
    engine = staged_engine()
    with TestClient(create_app(engine, settings_of())) as client:
        monkeypatch.setattr(engine, "completion", lambda _prompt: pytest.fail("it was encoded"))
        monkeypatch.setattr(engine, "chat", lambda _messages, **_: pytest.fail("it was encoded"))
        asked = {"model": MODEL, "prompt": ["a"] * 100}
        assert client.post("/v1/completions", json=asked).json()["error"]["param"] == "n"
        asked = {"model": MODEL, "messages": CALM, "n": 100}
        assert client.post("/v1/chat/completions", json=asked).json()["error"]["param"] == "n"


def test_requests_are_read_beside_the_loop_and_the_line_is_bounded(monkeypatch):
    """While one request is read others wait, the loop answers, and too many are refused."""
    engine = staged_engine()
    began, go_on, threads = threading.Event(), threading.Event(), []
    real = engine.chat

    def slow(messages, **options):
        threads.append(threading.current_thread())
        began.set()
        assert go_on.wait(30)
        return real(messages, **options)

    monkeypatch.setattr(engine, "chat", slow)
    body = {"model": MODEL, "messages": CALM}
    with TestClient(create_app(engine, settings_of(max_queue=1))) as client:
        loop_thread = client.portal.call(threading.current_thread)
        answers = []
        first = threading.Thread(
            target=lambda: answers.append(client.post("/v1/chat/completions", json=body))
        )
        first.start()
        assert began.wait(30)
        assert client.get("/healthz").status_code == 200
        refused = client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        go_on.set()
        first.join(30)
    assert answers[0].status_code == 200
    assert threads and loop_thread not in threads


def test_a_reader_gives_back_what_its_work_raises():
    async def main():
        reader = BodyReader(2)
        with pytest.raises(PromptError, match="as asked"):
            await reader.read(lambda: (_ for _ in ()).throw(PromptError("as asked")))
        return await reader.read(lambda: 5)

    assert asyncio.run(main()) == 5
