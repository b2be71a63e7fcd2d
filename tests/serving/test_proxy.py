"""The proxy in front of another server: keys, marks, canaries, bounds, both shapes."""

from __future__ import annotations

import asyncio
import gzip
import json

import httpx2
import pytest

from safe_decode.serving.app import create_app
from safe_decode.serving.proxy.app import create_proxy_app
from safe_decode.serving.proxy.middleware import ProxyParts, SafetyMiddleware
from safe_decode.serving.proxy.requests import CHAT, COMPLETIONS, MESSAGES
from tests.proxying import (
    BODIES,
    CHAT_BODY,
    MARK,
    Upstream,
    chunk,
    chunks_in,
    ended,
    named_events_in,
    ours,
    proxy_settings,
    shown_in,
    socket_upstream,
    sse,
    through,
)
from tests.servers import MODEL, settings_of, staged_engine
from tests.staged import ATTACK, CALM, CALM_TEXT, KEPT

STREAM = {**CHAT_BODY, "stream": True}
WORDS = "unguarded words"
WHOLE = {
    CHAT: {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "fine"},
                "finish_reason": "stop",
                "safety": ours(),
            }
        ]
    },
    COMPLETIONS: {
        "choices": [{"index": 0, "text": "fine", "finish_reason": "stop", "safety": ours()}]
    },
    MESSAGES: {
        "content": [{"type": "text", "text": "fine"}],
        "stop_reason": "end_turn",
        "safety": ours(),
    },
}
MAX_TOKENS = {"max_tokens": 64}


def served(ask, path=CHAT, **settings):
    """Ask the staged server through a proxy."""

    async def main():
        app = create_app(staged_engine(), settings_of(expose_alternatives=True))
        bundle = staged_engine().facts.bundle
        async with app.router.lifespan_context(app):
            inner = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
            own = proxy_settings(bundle=bundle, upstream="http://up", **settings)
            proxy = SafetyMiddleware(app, own, parts=ProxyParts.of(own, inner))
            transport = httpx2.ASGITransport(app=proxy)
            async with httpx2.AsyncClient(
                transport=transport, base_url="http://127.0.0.1"
            ) as outer:
                return await outer.post(path, json={"model": MODEL, **ask})

    return asyncio.run(main())


# In front of the server.


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_a_marked_upstream_passes_through(stream, path):
    asks = [({"messages": CALM}, "released"), ({"messages": ATTACK}, "rewound")]
    if path == COMPLETIONS:
        asks = [({"prompt": "A"}, "released")]
    for ask, action in asks:
        answer = served({**ask, **MAX_TOKENS, "stream": stream}, path, holdback_tokens=4)
        assert answer.status_code == 200 and f'"{action}"' in answer.text
        # Tokens' own texts, scores and what was taken back stay with the upstream.
        for name in ("token_ids", "statistic", "threshold", "dropped", "trip_step"):
            assert name not in answer.text


def test_a_refusal_is_shown_and_what_tripped_within_the_hold_back_is_not():
    answer = served({"messages": ATTACK, "stream": True}, holdback_tokens=4)
    chunks = chunks_in(answer)
    refusal = shown_in(chunks, "refusal")
    assert shown_in(chunks) == KEPT[:-4] + refusal and "No, " in refusal
    assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"


def test_what_is_asked_for_is_passed_on_and_nothing_else():
    ask = {"messages": CALM, "stream": True, "return_token_ids": True, "logprobs": True}
    ask |= {"top_logprobs": 2, "n": 2, "stream_options": {"include_usage": True}}
    chunks = chunks_in(served(ask, holdback_tokens=4))
    choices = [choice for told in chunks for choice in told["choices"]]
    for index in (0, 1):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == CALM_TEXT
        ids = [i for choice in own for i in choice.get("token_ids", [])]
        entries = [e for c in own if c["logprobs"] for e in c["logprobs"]["content"]]
        assert len(ids) == len(entries) == len(CALM_TEXT)
        assert "".join(entry["token"] for entry in entries) == CALM_TEXT
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == 2 * len(CALM_TEXT) and usage["prompt_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert all(told["usage"] is None for told in chunks[:-1])


def test_log_probabilities_of_completions_pass_when_asked_for():
    ask = {"prompt": "A", **MAX_TOKENS, "logprobs": 0}
    whole = served(ask, COMPLETIONS).json()["choices"][0]
    chunks = chunks_in(served({**ask, "stream": True}, COMPLETIONS, holdback_tokens=4))
    told = [c["choices"][0]["logprobs"] for c in chunks]
    streamed = [token for one in told if one for token in one["tokens"]]
    assert "".join(whole["logprobs"]["tokens"]) == "".join(streamed) == whole["text"] != ""
    plain = served({"prompt": "A", **MAX_TOKENS}, COMPLETIONS).json()
    assert plain["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("holdback", [0, 4])
@pytest.mark.parametrize("asks_ids", [False, True])
def test_messages_pass_through_and_refuse_by_stop_reason(holdback, asks_ids):
    wants = {"return_token_ids": True} if asks_ids else {}
    for messages, reason, text in ((CALM, "end_turn", CALM_TEXT), (ATTACK, "refusal", KEPT)):
        ask = {**MAX_TOKENS, "messages": messages, **wants}
        whole = served(ask, MESSAGES, holdback_tokens=holdback).json()
        assert whole["stop_reason"] == reason and whole["content"][0]["text"].startswith(text)
        answer = served({**ask, "stream": True}, MESSAGES, holdback_tokens=holdback)
        assert "text/event-stream" in answer.headers["content-type"]
        events = named_events_in(answer)
        names = [event["type"] for event in events]
        assert names[:2] == ["message_start", "content_block_start"]
        assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert events[-2]["delta"]["stop_reason"] == reason
        model = [e for e in events if e["type"] == "content_block_delta" and "safety" not in e]
        shown = "".join(event["delta"]["text"] for event in model)
        # Of an answer that trips, what was within the proxy's own hold-back is not shown.
        kept = text if reason == "end_turn" else text[: len(text) - holdback]
        assert shown == kept
        assert ("token_ids" in answer.text) == asks_ids


# Keys.


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
@pytest.mark.parametrize("key", [None, "theirs", "operators"])
def test_the_operator_s_key_is_never_attached_for_a_client_without_one(path, key):
    upstream = Upstream(WHOLE[path])
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    answer = through(
        upstream,
        BODIES[path],
        path=path,
        headers=headers,
        api_keys=["mine"],
        upstream_key="operators",
    )
    assert answer.status_code == 401 and upstream.paths == []
    assert answer.json()["error"]["message"].startswith("Incorrect API key")


def test_a_client_with_a_key_is_answered_and_its_key_goes_no_further():
    upstream = Upstream(WHOLE[CHAT])
    headers = {"x-api-key": "mine", "x-custom": "theirs"}
    answer = through(
        upstream, CHAT_BODY, headers=headers, api_keys=["mine"], upstream_key="operators"
    )
    assert answer.status_code == 200
    canary, asked = upstream.given
    assert "authorization" not in canary
    assert asked["authorization"] == "Bearer operators" and asked["accept-encoding"] == "identity"
    assert "mine" not in str(upstream.given) and "x-custom" not in asked


# The mark, the canary, forms and sizes.


def without_safety(path):
    body = json.loads(json.dumps(WHOLE[path]))
    for end in body.get("choices", [body]):
        del end["safety"]
    return body


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
@pytest.mark.parametrize(
    "hole",
    [
        {"mark": None},
        {"mark": MARK[::-1]},
        {"ready": 503},
        {"ready_mark": None},
        {"ready_mark": MARK[::-1]},
        {"answer": None},
        {"answer": b"[" * 100_000},
        {"answer": b'{"choices": NaN}'},
        {"answer": {"choices": []}},
        {"answer": {"choices": ["x"]}},
        {"answer": {"choices": "x"}},
        {"headers": {"content-encoding": "gzip"}},
        {"headers": {"content-type": "text/html"}},
        {"status": 206},
        {"status": 302, "headers": {"location": "http://elsewhere/"}},
        {"status": 401},
        {"status": 500},
    ],
)
def test_an_upstream_that_does_not_say_how_it_was_guarded_is_treated_as_failed(path, hole):
    fine = Upstream(WHOLE[path])
    assert "fine" in through(fine, BODIES[path], path=path).text
    given = {"answer": without_safety(path), **hole} if "answer" in hole else dict(hole)
    if given.get("answer", 0) is None:
        given["answer"] = without_safety(path)
    upstream = Upstream(given.pop("answer", WHOLE[path]), **given)
    answer = through(upstream, BODIES[path], path=path)
    assert answer.status_code == 503 and "fine" not in answer.text
    if path == MESSAGES:
        assert answer.json()["type"] == "error"


@pytest.mark.parametrize("position", [0, 1])
def test_every_choice_of_a_whole_answer_needs_its_mark(position):
    choices = [{**WHOLE[CHAT]["choices"][0], "index": index} for index in (0, 1)]
    ask = {**CHAT_BODY, "n": 2}
    assert through(Upstream({"choices": choices}), ask).status_code == 200
    del choices[position]["safety"]
    answer = through(Upstream({"choices": choices}), ask)
    assert answer.status_code == 503 and "fine" not in answer.text


@pytest.mark.parametrize(
    "change",
    [
        {"index": 1},
        {"index": -1},
        {"index": True},
        {"finish_reason": None},
        {"finish_reason": "tool_calls"},
        {"safety": ours("flagged")},
        {"safety": {**ours(), "unprotected": True}},
        {"safety": ours(bundle=MARK[::-1])},
        {"safety": ours(status="perhaps")},
        {"safety": ours(alpha=[WORDS])},
        {"safety": {"action": "released"}},
        {"safety": WORDS},
        {"message": {"content": [WORDS]}},
        {"message": WORDS},
    ],
)
def test_a_whole_choice_that_is_not_as_it_should_be_is_not_shown(change):
    choice = {**WHOLE[CHAT]["choices"][0], **change}
    answer = through(Upstream({"choices": [choice]}), CHAT_BODY)
    assert answer.status_code == 503 and WORDS not in answer.text


def test_whole_answers_are_written_anew_from_known_fields():
    told = {"reasoning_content": WORDS, "tool_calls": [{"function": {"arguments": WORDS}}]}
    told |= {"function_call": {"name": WORDS}, "audio": {"transcript": WORDS}}
    message = {**told, "role": WORDS, "content": "fine", "refusal": None}
    safety = ours(population="benign", why="a\nb" + "c" * 500, threshold=1.0)
    safety |= {"tokens": [{"text": WORDS}], "trip": {"dropped": [{"text": WORDS}]}}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "safety": safety, **told}
    choice["logprobs"] = {"content": [{"token": WORDS, "logprob": -1}]}
    body = {"id": WORDS, "model": WORDS, "system_fingerprint": WORDS, "created": WORDS, **told}
    body |= {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens_details": WORDS}}
    answer = through(Upstream(body, headers={"x-words": WORDS}), CHAT_BODY)
    assert answer.status_code == 200 and WORDS not in answer.text + str(answer.headers)
    told = answer.json()
    assert (told["model"], told["object"]) == ("m", "chat.completion")
    assert told["usage"]["total_tokens"] == 3
    assert told["choices"][0]["message"] == {
        "role": "assistant",
        "content": "fine",
        "refusal": None,
    }
    certificate = told["choices"][0]["safety"]["certificate"]
    assert "threshold" not in certificate and certificate["population"] == "benign"
    assert certificate["why"].startswith("a bc") and len(certificate["why"]) == 200


def test_a_whole_refusal_of_completions_stands_in_its_own_field():
    choice = {**WHOLE[COMPLETIONS]["choices"][0], "refusal": "No."}
    for refusal in ("No.", None, ""):
        body = {"choices": [{**choice, "refusal": refusal}]}
        answer = through(Upstream(body), BODIES[COMPLETIONS], path=COMPLETIONS).json()
        assert answer["choices"][0]["refusal"] == (refusal or None)
        assert answer["object"] == "text_completion"


@pytest.mark.parametrize(
    "change",
    [
        {"content": [{"type": "tool_use", "input": WORDS}]},
        {"content": [{"type": "thinking", "thinking": WORDS}]},
        {"stop_reason": "tool_use"},
        {"stop_reason": "stop_sequence", "stop_sequence": WORDS},
        {"safety": {**ours("rewound"), "refusal": 7}},
        {"safety": {**ours("rewound"), "refusal": WORDS * 10_000}},
    ],
)
def test_blocks_other_than_text_are_not_shown(change):
    answer = through(Upstream({**WHOLE[MESSAGES], **change}), BODIES[MESSAGES], path=MESSAGES)
    assert answer.status_code == 503 and WORDS not in answer.text


def test_a_stop_string_of_the_client_is_told():
    body = {**WHOLE[MESSAGES], "stop_reason": "stop_sequence", "stop_sequence": "END"}
    ask = {**BODIES[MESSAGES], "stop_sequences": ["END"]}
    assert through(Upstream(body), ask, path=MESSAGES).json()["stop_sequence"] == "END"


def test_words_of_a_refusing_upstream_stay_behind():
    error = {"message": WORDS, "code": "model_not_found", "param": "model", "type": WORDS}
    for status in (400, 404, 413, 422, 429):
        headers = {"retry-after": "7", "x-words": WORDS}
        answer = through(Upstream({"error": error}, status=status, headers=headers), CHAT_BODY)
        assert answer.status_code == status and answer.headers["retry-after"] == "7"
        told = answer.json()["error"]
        assert (told["code"], told["param"]) == ("model_not_found", "model")
        assert WORDS not in answer.text + str(answer.headers)
    foreign = {"error": {"message": WORDS, "code": WORDS, "param": WORDS}}
    for body in (foreign, {"error": WORDS}, b"\xff", WHOLE[CHAT]):
        answer = through(Upstream(body, status=400, headers={"retry-after": WORDS}), CHAT_BODY)
        assert answer.status_code == 400 and "retry-after" not in answer.headers
        assert WORDS not in answer.text and "fine" not in answer.text


def test_a_refusal_of_the_server_keeps_its_code():
    answer = served({"messages": CALM, "model": "another"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_not_asked_for_in_that_form_is_refused(stream):
    other = WHOLE[CHAT] if stream else sse(chunk(WORDS, [1]), ended())
    answer = through(Upstream(other), {**CHAT_BODY, "stream": stream})
    assert answer.status_code == 503 and "another form" in answer.json()["error"]["message"]


def test_a_packed_bomb_is_neither_unpacked_nor_read_beyond_its_bound():
    bomb = gzip.compress(b" " * 5_000_000)
    packed = Upstream(bomb, headers={"content-encoding": "gzip"})
    assert through(packed, CHAT_BODY).status_code == 503
    for status in (200, 400):
        large = Upstream(b" " * 200_000, status=status)
        answer = through(large, CHAT_BODY, max_answer_bytes=100_000)
        assert answer.status_code == (503 if status == 200 else 400)
    endless = Upstream(sse(*[chunk("a", [1])] * 1000))
    chunks = chunks_in(through(endless, STREAM, max_answer_bytes=20_000))
    assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert len(shown_in(chunks)) < 1000


def test_a_passed_canary_counts_for_a_while_and_a_failure_ends_it():
    upstream = Upstream(WHOLE[CHAT])
    through(upstream, CHAT_BODY, times=3)
    assert upstream.paths.count("/readyz") == 1
    upstream = Upstream(WHOLE[CHAT])
    through(upstream, CHAT_BODY, times=3, canary_every_s=0)
    assert upstream.paths.count("/readyz") == 3
    failing = Upstream({"choices": []})
    through(failing, CHAT_BODY, times=3)
    assert failing.paths == ["/readyz", CHAT] * 3
    unready = Upstream(WHOLE[CHAT], ready=503)
    assert through(unready, CHAT_BODY, times=3).status_code == 503
    assert unready.paths == ["/readyz"]  # asked again after a second, not for each client


# Requests.


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
@pytest.mark.parametrize(
    "extra",
    [
        {"vllm_xargs": {"safe_decode": "off"}},
        {"extra_body": {"x": 1}},
        {"stop_token_ids": [1]},
        {"ignore_eos": True},
        {"include_stop_str_in_output": True},
        {"prompt_logprobs": 5},
        {"skip_special_tokens": False},
        {"chat_template": "{{ x }}"},
        {"add_generation_prompt": False},
        {"documents": []},
        {"guided_json": {}},
        {"min_tokens": 10},
        {"safety": {"redirect": "flag"}},
        {"safety": {"on_error": "allow"}},
        {"safety": {"holdback_tokens": -1}},
    ],
)
def test_what_is_not_known_never_goes_upstream(path, extra):
    upstream = Upstream(WHOLE[path])
    answer = through(upstream, {**BODIES[path], **extra}, path=path)
    assert answer.status_code == 400 and upstream.asked == []
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (COMPLETIONS, {"echo": True}),
        (COMPLETIONS, {"suffix": "x"}),
        (COMPLETIONS, {"best_of": 2}),
        (COMPLETIONS, {"prompt": ["a"] * 9}),
        (CHAT, {"n": 9}),
        (CHAT, {"tools": [{"type": "function"}]}),
        (CHAT, {"tool_choice": "required"}),
        (CHAT, {"audio": {"voice": "x"}}),
        (CHAT, {"modalities": ["audio"]}),
        (CHAT, {"reasoning_effort": "high"}),
        (MESSAGES, {"thinking": {"type": "enabled"}}),
        (MESSAGES, {"tools": [{}]}),
    ],
)
def test_what_is_known_and_not_guarded_is_refused_by_name(path, extra):
    upstream = Upstream(WHOLE[path])
    answer = through(upstream, {**BODIES[path], **extra}, path=path)
    assert answer.status_code == 400 and upstream.asked == []
    name = next(iter(extra))
    assert ("n=" if name == "prompt" else name) in answer.json()["error"]["message"]


def test_what_goes_upstream_is_listed():
    upstream = Upstream(WHOLE[CHAT])
    asked = {**CHAT_BODY, "temperature": 0.5, "seed": 3, "stop": ["x"], "n": 1}
    asked |= {"safety": {"holdback_tokens": 9}, "response_format": {"type": "text"}}
    dropped = {"user": "me", "metadata": {"a": "b"}, "store": True, "tools": [], "audio": None}
    dropped |= {"return_token_ids": False, "tool_choice": "auto", "parallel_tool_calls": True}
    assert through(upstream, {**asked, **dropped}).status_code == 200
    assert upstream.asked == [{**asked, "return_token_ids": True}]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 50_000, b'{"model": "\\ud800"}', b"{}"]
)
def test_a_body_that_is_none_is_refused(body):
    upstream = Upstream(WHOLE[CHAT])
    answer = through(upstream, body)
    assert answer.status_code == 400 and upstream.paths == []


def test_a_large_body_is_refused_before_anything_is_asked():
    upstream = Upstream(WHOLE[CHAT])
    answer = through(upstream, {**CHAT_BODY, "user": "x" * 3000}, max_body_bytes=2000)
    assert answer.status_code == 413 and upstream.paths == []


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/chat/completions/", "/v1/models"])
def test_other_endpoints_are_not_passed_on(path):
    upstream = Upstream(WHOLE[CHAT])
    assert through(upstream, CHAT_BODY, path=path).status_code == 404
    assert upstream.paths == []


# Streams over a socket: broken, hanging, dripping, left.


def over_socket(*pieces, then, body=STREAM, **settings):
    async def main():
        async with socket_upstream(*pieces, then=then) as address:
            own = proxy_settings(upstream=address, **settings)
            parts = ProxyParts.of(own)
            transport = httpx2.ASGITransport(app=SafetyMiddleware(None, own, parts=parts))
            async with httpx2.AsyncClient(
                transport=transport, base_url="http://127.0.0.1"
            ) as outer:
                answer = await asyncio.wait_for(outer.post(CHAT, json=body), 60)
            metrics = parts.metrics.text().decode()
            await parts.close()
            return answer, metrics

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("then", "n_pieces"), [("close", 1), ("close", 2), ("hang", 1), ("drip", 2)]
)
def test_a_stream_that_does_not_end_is_closed_in_time(then, n_pieces):
    pieces = [*sse(chunk("ab", [1, 2]), done=False), b"data: {"][:n_pieces]
    answer, metrics = over_socket(*pieces, then=then, request_timeout_s=3)
    chunks = chunks_in(answer)
    assert shown_in(chunks) == "ab"
    last = chunks[-1]["choices"][0]
    assert last["finish_reason"] == "content_filter" and last["safety"]["action"] == "closed"
    assert "safe_decode_guard_failures_total 1.0" in metrics


def test_an_upstream_that_says_nothing_in_time_is_refused():
    answer, metrics = over_socket(then="hang", request_timeout_s=0.5)
    assert answer.status_code == 503 and "in time" in answer.json()["error"]["message"]
    assert "safe_decode_guard_failures_total 1.0" in metrics


def test_nothing_is_awaited_once_every_choice_has_ended():
    answer, metrics = over_socket(*sse(chunk("a", [1]), ended(), done=False), then="hang")
    assert shown_in(chunks_in(answer)) == "a"
    assert "safe_decode_guard_failures_total 0.0" in metrics


def test_an_upstream_that_cannot_be_reached_is_refused():
    async def main():
        own = proxy_settings(upstream="http://127.0.0.1:9", connect_timeout_s=2)
        app = create_proxy_app(own)
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as outer:
            return await outer.post(CHAT, json=CHAT_BODY), await outer.get("/readyz")

    for answer in asyncio.run(main()):
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"


def driven(pieces, act):
    """Run one stream by hand; `act` gets the deadlines and what was sent, and lets it end."""

    async def main():
        async with socket_upstream(*pieces, then="hang") as address:
            settings = proxy_settings(upstream=address)
            made = ProxyParts.of(settings)
            sent, left = [], asyncio.Event()
            told = [{"type": "http.request", "body": json.dumps(STREAM).encode()}]

            async def receive():
                if told:
                    return told.pop()
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            scope = {
                "type": "http",
                "method": "POST",
                "path": CHAT,
                "headers": [(b"host", b"127.0.0.1")],
            }
            proxy = SafetyMiddleware(None, settings, parts=made)
            task = asyncio.create_task(proxy(scope, receive, send))
            while not any(b"ab" in message.get("body", b"") for message in sent):
                assert not task.done(), sent
                await asyncio.sleep(0.01)
            await act(made, left)
            await asyncio.wait_for(task, 60)
            metrics = made.metrics.text().decode()
            await made.close()
            return b"".join(m.get("body", b"") for m in sent).decode(), sent, metrics

    return asyncio.run(main())


@pytest.mark.parametrize("by", ["reader", "end"])
def test_a_reader_who_leaves_and_the_end_of_the_process_end_a_stream(by):
    async def act(made, left):
        if by == "reader":
            left.set()
        else:
            await made.deadlines.drain(0.05)

    pieces = sse(chunk("ab", [1, 2]), done=False)
    text, sent, metrics = driven(pieces, act)
    assert '"action":"cut"' in text and text.endswith("data: [DONE]\n\n")
    assert not sent[-1].get("more_body")
    # Nothing failed: the upstream is believed as before.
    assert "safe_decode_guard_failures_total 0.0" in metrics


def test_nothing_new_is_taken_at_the_end():
    async def main():
        own = proxy_settings()
        parts = ProxyParts.of(own)
        parts.deadlines.begin_drain()
        transport = httpx2.ASGITransport(app=SafetyMiddleware(None, own, parts=parts))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as outer:
            return await outer.post(CHAT, json=CHAT_BODY)

    answer = asyncio.run(main())
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"


# Operation.


def test_health_readiness_and_metrics_of_the_proxy():
    async def main(upstream):
        own = proxy_settings(operator_keys=["ops"])
        inner = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=upstream))
        app = create_proxy_app(own, ProxyParts.of(own, inner))
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as outer:
            await outer.post(CHAT, json=CHAT_BODY)
            keyed = {"authorization": "Bearer ops"}
            return [
                await outer.get("/healthz"),
                await outer.get("/readyz"),
                await outer.get("/metrics"),
                await outer.get("/metrics", headers=keyed),
            ]

    health, ready, closed, metrics = asyncio.run(main(Upstream(WHOLE[CHAT])))
    assert (health.status_code, ready.status_code, closed.status_code) == (200, 200, 401)
    assert 'safe_decode_rows_total{endpoint="/v1/chat/completions",finish_reason="stop"} 1.0' in (
        metrics.text
    )
    for upstream in (Upstream({}, ready=503), Upstream({}, ready_mark=None)):
        health, ready, *_ = asyncio.run(main(upstream))
        assert (health.status_code, ready.status_code) == (200, 503)


def test_the_audit_log_has_one_line_a_response_and_no_text(tmp_path):
    audit = tmp_path / "audit.jsonl"
    chunks = [
        chunk("fine", [1]),
        chunk("No.", [2], refusal="No."),
        ended("content_filter", "refused"),
    ]
    through(Upstream(sse(*chunks)), STREAM, audit=audit)
    through(Upstream(WHOLE[CHAT]), CHAT_BODY, audit=audit)
    turned, whole = map(json.loads, audit.read_text().splitlines())
    assert (turned["action"], turned["finish_reason"]) == ("refused", "content_filter")
    assert (whole["action"], whole["finish_reason"]) == ("released", "stop")
    assert whole["bundle"] == MARK and "fine" not in audit.read_text()
