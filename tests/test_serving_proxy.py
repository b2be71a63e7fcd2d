"""The proxy in front of another server: marks, canaries, hold-back by ids, both shapes."""

from __future__ import annotations

import asyncio
import json

import httpx2
import pytest

from safe_decode.serving.app import create_app
from safe_decode.serving.middleware import SafetyMiddleware
from safe_decode.serving.relay import Relay
from safe_decode.serving.relay_messages import MessageRelay
from tests.serving import MODEL, settings_of, staged_engine
from tests.staged import ATTACK, CALM, CALM_TEXT, KEPT

BODY = {"model": MODEL, "messages": CALM}


def through_proxy(upstream, ask, *, bundle=None, path="/v1/chat/completions", **options):
    """Ask a proxy in front of `upstream`, in process."""

    async def nothing(*_):
        raise AssertionError("not reached")

    async def call():
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=upstream), base_url="http://upstream"
        ) as inner:
            marker = bundle or staged_engine().facts.bundle
            proxy = SafetyMiddleware(
                nothing, upstream="http://upstream", bundle=marker, client=inner, **options
            )
            transport = httpx2.ASGITransport(app=proxy)
            async with httpx2.AsyncClient(transport=transport, base_url="http://proxy") as outer:
                return await outer.post(path, json=ask)

    return asyncio.run(call())


def served(run):
    """Run a call against the staged server, its lifespan begun."""

    async def main():
        app = create_app(staged_engine(), settings_of())
        async with app.router.lifespan_context(app):
            return await run(app)

    return asyncio.run(main())


async def ask_through(app, ask, path="/v1/chat/completions", **options):
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app)) as inner:
        marker = staged_engine().facts.bundle
        proxy = SafetyMiddleware(app, upstream="http://up", bundle=marker, client=inner, **options)
        transport = httpx2.ASGITransport(app=proxy)
        async with httpx2.AsyncClient(transport=transport, base_url="http://proxy") as outer:
            return await outer.post(path, json=ask)


@pytest.mark.parametrize("stream", [False, True])
def test_a_marked_upstream_passes_through(stream):
    for messages, action in ((CALM, "released"), (ATTACK, "rewound")):
        ask = {**BODY, "messages": messages, "stream": stream}
        answer = served(lambda app, ask=ask: ask_through(app, ask, holdback_tokens=4))
        assert answer.status_code == 200 and f'"{action}"' in answer.text
        assert "token_ids" not in answer.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/embeddings"])
def test_an_upstream_without_our_mark_is_treated_as_failed(path):
    async def bare(_scope, _receive, send):
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        choices = [{"index": 0, "message": {"content": "unguarded words"}}]
        content = json.dumps({"choices": choices}).encode()
        await send({"type": "http.response.body", "body": content})

    answer = through_proxy(bare, BODY, path=path)
    assert answer.status_code == (404 if "embeddings" in path else 503)
    assert "unguarded" not in answer.text
    if path == "/v1/messages":
        assert answer.json()["type"] == "error"


def chunk(text="", ids=(), **choice):
    body = {"index": 0, "delta": {"content": text} if text else {}, **choice}
    return json.dumps({"choices": [{**body, "token_ids": list(ids)}]}).encode()


def shown_of(chunks):
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)


def test_the_proxy_s_hold_back_counts_ids_and_not_chunks():
    relay = Relay(3, is_marked=lambda safety: safety == "ours", keeps_ids=False)
    assert shown_of(relay.take(chunk("a", [1]))) == ""
    assert shown_of(relay.take(chunk("", []))) == ""
    assert shown_of(relay.take(chunk("bcd", [2, 3, 4]))) == "a"
    end = list(relay.take(chunk(finish_reason="stop", safety="ours")))
    assert shown_of(end) == "bcd" and list(relay.close({})) == []


def test_what_trips_within_the_proxy_s_hold_back_is_not_shown():
    relay = Relay(3, is_marked=lambda safety: safety == "ours", keeps_ids=False)
    told = [*relay.take(chunk("a", [1])), *relay.take(chunk("b", [2]))]
    told += relay.take(chunk(finish_reason="content_filter", safety="ours"))
    assert shown_of(told) == "" and told[-1]["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize(
    "last",
    [
        None,
        chunk(finish_reason="stop"),
        chunk(finish_reason="stop", safety="theirs"),
        chunk("text without ids"),
        b"{",
    ],
)
def test_a_stream_that_does_not_say_how_it_was_guarded_is_closed(last):
    relay = Relay(2, is_marked=lambda safety: safety == "ours", keeps_ids=False)
    told = list(relay.take(chunk("a", [1])))
    if last is not None:
        with pytest.raises(ValueError, match=r".*"):
            list(relay.take(last))
    told += relay.close({"action": "closed"})
    assert shown_of(told) == ""
    assert told[-1]["choices"][0]["safety"] == {"action": "closed"}
    assert told[-1]["choices"][0]["finish_reason"] == "content_filter"


# Anthropic's shape through the proxy.


def events_of(answer):
    pairs = [event.split("\n") for event in answer.text.strip().split("\n\n")]
    told = [(name.removeprefix("event: "), json.loads(data[6:])) for name, data in pairs]
    assert all(name == body["type"] for name, body in told)
    return told


def said_in(events):
    return "".join(body["delta"].get("text", "") for _, body in events if "delta" in body)


@pytest.mark.parametrize("holdback", [0, 4])
@pytest.mark.parametrize("asks_ids", [False, True])
def test_messages_pass_through_and_refuse_by_stop_reason(holdback, asks_ids):
    wants = {"return_token_ids": True} if asks_ids else {}
    for messages, reason, text in ((CALM, "end_turn", CALM_TEXT), (ATTACK, "refusal", KEPT)):
        ask = {"model": MODEL, "max_tokens": 64, "messages": messages, **wants}
        call = {"path": "/v1/messages", "holdback_tokens": holdback}
        whole = served(lambda app, a=ask, c=call: ask_through(app, a, **c)).json()
        refusal = whole["safety"]["refusal"] or ""
        assert whole["stop_reason"] == reason and whole["content"][0]["text"] == text + refusal
        streamed = {**ask, "stream": True}
        answer = served(lambda app, a=streamed, c=call: ask_through(app, a, **c))
        assert "text/event-stream" in answer.headers["content-type"]
        events = events_of(answer)
        names = [name for name, _ in events]
        assert names[:2] == ["message_start", "content_block_start"]
        assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert events[-2][1]["delta"]["stop_reason"] == reason
        # Of an answer that trips, what was within the proxy's own hold-back is not shown.
        shown = said_in(events).removesuffix(refusal)
        assert shown == text if reason == "end_turn" else text.startswith(shown)
        if reason == "refusal":
            assert len(shown) == len(text) - holdback
        assert ("token_ids" in answer.text) == asks_ids


def event(kind, **fields):
    return json.dumps({"type": kind, **fields}).encode()


def delta(text, *ids, **fields):
    body = {"type": "text_delta", "text": text}
    return event("content_block_delta", index=0, delta=body, token_ids=list(ids), **fields)


def message_relay(holdback_tokens):
    relay = MessageRelay(holdback_tokens, is_marked=lambda s: s.get("by") == "us", keeps_ids=False)
    opening = [event("message_start", message={"content": []}), event("content_block_start")]
    for data in opening:
        assert len(list(relay.take(data))) == 1
    return relay


def texts(events):
    return "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")


def test_the_hold_back_of_messages_counts_ids():
    relay = message_relay(3)
    assert texts(relay.take(delta("a", 1))) == ""
    assert texts(relay.take(delta("bcd", 2, 3, 4))) == "a"
    assert list(relay.take(event("content_block_stop", index=0))) == []
    end = event("message_delta", delta={"stop_reason": "end_turn"}, safety={"by": "us"})
    told = list(relay.take(end))
    assert [e["type"] for e in told] == [
        "content_block_delta",
        "content_block_stop",
        "message_delta",
    ]
    assert texts(told) == "bcd"
    assert [e["type"] for e in relay.take(event("message_stop"))] == ["message_stop"]
    assert list(relay.close({})) == []


def test_words_of_the_guard_are_shown_and_what_they_replace_is_not():
    relay = message_relay(3)
    assert texts(relay.take(delta("ab", 1, 2))) == ""
    assert texts(relay.take(delta("No.", 9, safety={"by": "redirect"}))) == "No."


@pytest.mark.parametrize(
    "last",
    [
        None,
        event("message_delta", delta={"stop_reason": "end_turn"}),
        event("message_delta", delta={"stop_reason": "end_turn"}, safety={"by": "them"}),
        event("message_stop"),
        event("error", error={"message": "gone"}),
        delta("text without ids"),
        event("content_block_start", content_block={"text": "text"}),
        b"{",
        b"[]",
    ],
)
def test_a_message_that_does_not_say_how_it_was_guarded_is_closed(last):
    relay = message_relay(2)
    told = list(relay.take(delta("a", 1)))
    if last is not None:
        with pytest.raises(ValueError, match=r".*"):
            list(relay.take(last))
    told += relay.close({"action": "closed"})
    assert texts(told) == ""
    kinds = [e["type"] for e in told]
    assert kinds == ["content_block_stop", "message_delta", "message_stop"]
    assert told[1]["delta"]["stop_reason"] == "refusal"
    assert told[1]["safety"] == {"action": "closed"}


def test_a_message_that_never_began_is_opened_and_closed():
    relay = MessageRelay(0, is_marked=bool, keeps_ids=False)
    kinds = [e["type"] for e in relay.close({})]
    assert kinds[:2] == ["message_start", "content_block_start"] and kinds[-1] == "message_stop"


@pytest.mark.parametrize("status", [206, 302, 400, 500])
def test_an_answer_that_only_looks_like_a_refusal_is_not_passed_on(status):
    async def upstream(scope, _receive, send):
        ready = scope["path"] == "/readyz"
        mark = (b"x-safe-decode-bundle", staged_engine().facts.bundle[:16].encode())
        headers = [(b"content-type", b"application/json"), mark]
        code = 200 if ready else status
        await send({"type": "http.response.start", "status": code, "headers": headers})
        body = {"error": {"message": "no"}, "choices": [{"message": {"content": "unguarded"}}]}
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    answer = through_proxy(upstream, BODY)
    assert answer.status_code == 503 and "unguarded" not in answer.text


def test_a_refusal_of_the_upstream_is_passed_on_as_it_is():
    ask = {**BODY, "model": "another"}
    answer = served(lambda app: ask_through(app, ask))
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
