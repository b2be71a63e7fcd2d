"""Where clients of vLLM's server find that an answer was redirected; without vLLM."""

import asyncio
import json

from safe_decode.engines.vllm.openai_finish import ContentFilterFinish

TRIPPED = {
    "index": 0,
    "message": {"content": "No.", "tool_calls": [{"id": "1"}]},
    "finish_reason": "stop",
    "stop_reason": "content_filter",
}
OTHER = {"index": 1, "message": {"content": "content_filter"}, "finish_reason": "stop"}


def answered(kind, *parts):
    """What a client gets of an answer that comes in parts."""

    async def app(_scope, _receive, send):
        headers = [(b"Content-Type", kind), (b"content-length", b"%d" % sum(map(len, parts)))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i, part in enumerate(parts):
            more = i + 1 < len(parts)
            await send({"type": "http.response.body", "body": part, "more_body": more})

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(ContentFilterFinish(app)({"type": "http"}, None, send))
    return dict(sent[0]["headers"]), [one["body"] for one in sent[1:]]


def test_a_whole_answer_ends_as_filtered_and_its_tool_calls_are_withdrawn():
    body = json.dumps({"choices": [TRIPPED, OTHER]}).encode()
    headers, parts = answered(b"application/json; charset=utf-8", body[:30], body[30:])
    whole = b"".join(parts)
    assert int(headers[b"content-length"]) == len(whole)
    tripped, other = json.loads(whole)["choices"]
    assert (tripped["finish_reason"], tripped["message"]["tool_calls"]) == ("content_filter", [])
    assert other == OTHER


def test_a_stream_ends_as_filtered_and_no_frame_waits_for_the_next():
    last = {"choices": [{"index": 0, "delta": {}, **TRIPPED}]}
    frames = [b'data: {"choices":[]}\n\n', b"data: " + json.dumps(last).encode() + b"\n\n"]
    parts = [frames[0], frames[1][:20], frames[1][20:], b"data: [DONE]\n\n"]
    _, sent = answered(b"text/event-stream", *parts)
    assert [bool(one) for one in sent] == [True, False, True, True]
    assert (sent[0], sent[3]) == (frames[0], b"data: [DONE]\n\n")
    ended = json.loads(sent[2].removeprefix(b"data: "))
    assert ended["choices"][0]["finish_reason"] == "content_filter"


def test_what_holds_no_tripped_answer_stays_byte_for_byte():
    for kind, body in (
        (b"application/json", json.dumps({"choices": [OTHER]}).encode()),
        (b"application/json", b"content_filter, and no JSON"),
        (b"text/event-stream", b": content_filter\n\n"),
        (b"text/plain", json.dumps({"choices": [TRIPPED]}).encode()),
    ):
        assert b"".join(answered(kind, body)[1]) == body
