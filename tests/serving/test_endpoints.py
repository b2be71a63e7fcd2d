"""Endpoints beyond the first three: responses, counting, tokens, what is not served, origins."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from safe_decode.serving.app import create_app
from safe_decode.serving.requests.admission import IGNORED
from safe_decode.serving.schemas.notice import WITHHELD
from tests.servers import MODEL, settings_of, staged_engine
from tests.staged import ATTACK, CALM, CALM_TEXT, KEPT, OPENER

RESPONSES = "/v1/responses"


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(staged_engine(), settings_of())) as opened:
        yield opened


def ask(client, path=RESPONSES, **body):
    return client.post(path, json={"model": MODEL, **body})


def events_of(response):
    assert response.status_code == 200, response.text
    blocks = [block.splitlines() for block in response.text.strip().split("\n\n")]
    told = [(block[0][7:], json.loads(block[1][6:])) for block in blocks]
    assert all(name == body["type"] for name, body in told)
    return [body for _, body in told]


# Responses.


def test_a_response_takes_text_or_messages_and_instructions(client):
    text = CALM[0]["content"]
    for given in (
        text,
        CALM,
        [{"role": "user", "content": [{"type": "input_text", "text": text}]}],
    ):
        body = ask(client, input=given).json()
        assert body["object"] == "response" and body["status"] == "completed"
        (item,) = body["output"]
        assert item["type"] == "message" and item["role"] == "assistant"
        assert item["content"] == [
            {"type": "output_text", "text": CALM_TEXT, "annotations": [], "logprobs": []}
        ]
        assert body["incomplete_details"] is None and body["error"] is None
        assert body["safety"]["certificate"]["status"] == "valid"
    longer = ask(client, input=text, instructions="Be brief.").json()
    assert longer["instructions"] == "Be brief."
    assert longer["usage"]["input_tokens"] > body["usage"]["input_tokens"]
    cut = ask(client, input=text, max_output_tokens=5).json()
    assert cut["output"][0]["content"][0]["text"] == CALM_TEXT[:5]
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}
    assert cut["status"] == cut["output"][0]["status"] == "incomplete"


def test_a_trip_of_a_response_is_incomplete_and_its_refusal_is_seen_once(client):
    body = ask(client, input=ATTACK).json()
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "content_filter"}
    refusal = body["safety"]["refusal"]
    assert refusal.startswith(f" ... {OPENER}") and body["safety"]["action"] == "rewound"
    parts = body["output"][0]["content"]
    assert [part["type"] for part in parts] == ["output_text"]
    assert parts[0]["text"] == KEPT + refusal


@pytest.mark.parametrize("as_content", [True, False])
@pytest.mark.parametrize("messages", [CALM, ATTACK])
def test_a_streamed_response_is_the_whole_one_event_by_event(messages, as_content):
    settings = settings_of(refusal_as_content=as_content)
    with TestClient(create_app(staged_engine(), settings)) as opened:
        whole = ask(opened, input=messages).json()
        told = events_of(ask(opened, input=messages, stream=True))
    assert [body["sequence_number"] for body in told] == list(range(len(told)))
    kinds = [body["type"] for body in told]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-2:] == ["response.output_item.done", f"response.{whole['status']}"]
    last = told[-1]["response"]
    own = ("id", "created_at", "output")
    assert {k: v for k, v in last.items() if k not in own} == {
        k: v for k, v in whole.items() if k not in own
    }
    parts = whole["output"][0]["content"]
    assert last["output"][0]["content"] == parts
    for index, part in enumerate(parts):
        mine = [body for body in told if body.get("content_index") == index]
        said = "".join(body["delta"] for body in mine if body["type"].endswith(".delta"))
        assert said == part.get("text", part.get("refusal"))
        assert mine[-1]["type"] == "response.content_part.done" and mine[-1]["part"] == part
    is_apart = messages == ATTACK and not as_content
    assert [part["type"] for part in parts] == ["output_text", "refusal"][: 1 + is_apart]


def test_a_response_handed_back_as_it_came_is_read(client):
    first = ask(client, input=CALM).json()
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    again = ask(client, input=[*CALM, thought, *first["output"], *CALM])
    assert again.status_code == 200, again.text
    plain = [*CALM, {"role": "assistant", "content": CALM_TEXT}, *CALM]
    assert again.json()["usage"] == ask(client, input=plain).json()["usage"]
    named = again.headers[IGNORED].split(", ")
    assert named[0] == "input.reasoning" and "input.id" in named


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "1"}]}, "input.0.type"),
        ({"input": [{"type": "message", "content": "a"}]}, "input.0.role"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
        ),
        ({"safety": {"redirect": "flag"}}, "safety.redirect"),
        ({"guided_json": {}}, "guided_json"),
    ],
)
def test_what_a_response_cannot_be_is_refused_by_name(client, extra, param):
    response = ask(client, **{"input": CALM, **extra})
    assert response.status_code == 400 and response.json()["error"]["param"] == param


# Counting, and what is not served.


def test_tokens_are_counted_as_the_answer_counts_them(client):
    asked = {"messages": CALM, "system": [{"type": "text", "text": "You help."}]}
    counted = ask(client, "/v1/messages/count_tokens", **asked)
    answered = ask(client, "/v1/messages", max_tokens=2, **asked).json()
    assert counted.json() == {"input_tokens": answered["usage"]["input_tokens"]}
    refused = ask(client, "/v1/messages/count_tokens", messages=CALM, tools=[{"name": "f"}])
    assert refused.status_code == 400 and refused.json()["type"] == "error"
    assert "tools" in refused.json()["error"]["message"]


def test_tokens_of_a_prompt_are_those_that_are_read(client):
    ids = list(staged_engine().chat(CALM).ids)
    told = ask(client, "/tokenize", messages=CALM).json()
    assert told == {"tokens": ids, "count": len(ids), "max_model_len": 1024}
    text = ask(client, "/tokenize", prompt="AB").json()
    assert text["tokens"] == list(staged_engine().completion("AB").ids)
    for wrong in ({}, {"prompt": "a", "messages": CALM}, {"prompt": ""}):
        assert ask(client, "/tokenize", **wrong).status_code == 400


@pytest.mark.parametrize(
    "path", ["embeddings", "moderations", "images/generations", "audio/speech", "rerank"]
)
def test_what_other_servers_have_is_refused_by_name(client, path):
    response = client.post(f"/v1/{path}", content=b"anything")
    error = response.json()["error"]
    assert response.status_code == 404 and error["code"] == "unsupported_endpoint"
    assert f"/v1/{path} is not served" in error["message"]


def test_new_endpoints_want_a_key_where_there_are_keys():
    settings = settings_of(api_keys=("k",))
    with TestClient(create_app(staged_engine(), settings)) as opened:
        for path in (RESPONSES, "/v1/messages/count_tokens", "/tokenize", "/v1/embeddings"):
            assert ask(opened, path).status_code == 401


# A turn that the guard ended before anything was shown.


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
def test_a_filtered_turn_never_looks_empty(client, path):
    early = [*CALM, {"role": "assistant", "content": "0123456789abcdef"}]
    stop = {"safety": {"redirect": "stop"}, "max_tokens": 40}
    asked = {"messages": early, **stop}
    if path == "/v1/completions":
        asked = {"prompt": list(staged_engine().chat(early).ids), **stop}
    body = ask(client, path, **asked).json()
    if path == "/v1/messages":
        assert body["content"] == [{"type": "text", "text": WITHHELD}]
        assert body["stop_reason"] == "refusal" and body["safety"]["refusal"] == WITHHELD
    else:
        choice = body["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        told = choice.get("message", choice)
        assert told.get("content", told.get("text")) == told["refusal"] == WITHHELD
        assert body["usage"]["completion_tokens"] == 0
    assert WITHHELD in ask(client, path, stream=True, **asked).text


def test_a_filtered_turn_of_data_says_so_beside_the_data():
    early = [*CALM, {"role": "assistant", "content": "0123456789abcdef"}]
    with TestClient(create_app(staged_engine(), settings_of(allow_json=True))) as opened:
        body = ask(
            opened,
            "/v1/chat/completions",
            messages=early,
            response_format={"type": "json_object"},
        ).json()
    message = body["choices"][0]["message"]
    assert (message["content"], message["refusal"]) == ("", WITHHELD)


# Origins.


def preflight(client, path, origin):
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    return client.options(path, headers=headers)


def test_no_foreign_page_may_call_unless_the_operator_names_its_origin(client):
    assert "access-control-allow-origin" not in preflight(client, RESPONSES, "https://a.b").headers
    settings = settings_of(cors_origins=("https://a.b",), api_keys=("k",))
    with TestClient(create_app(staged_engine(), settings)) as opened:
        good = preflight(opened, RESPONSES, "https://a.b")
        assert good.status_code == 200
        assert good.headers["access-control-allow-origin"] == "https://a.b"
        assert "authorization" in good.headers["access-control-allow-headers"].lower()
        bad = preflight(opened, RESPONSES, "https://evil.b")
        assert bad.status_code == 400 and "access-control-allow-origin" not in bad.headers
        for path in ("/metrics", "/", "/page/bare"):
            told = preflight(opened, path, "https://a.b").headers
            assert "access-control-allow-origin" not in told
        key = {"authorization": "Bearer k", "origin": "https://a.b"}
        body = {"model": MODEL, "messages": CALM, "keep_alive": 5}
        answer = opened.post("/v1/chat/completions", json=body, headers=key)
        assert answer.headers["access-control-allow-origin"] == "https://a.b"
        assert IGNORED in answer.headers["access-control-expose-headers"]
        assert opened.post("/v1/chat/completions", json=body).status_code == 401


@pytest.mark.parametrize("origin", ["a.b", "https://a.b/", "https://a.b/x", "null", "https://*.b"])
def test_what_is_no_origin_is_refused_at_the_start(origin):
    with pytest.raises(ValueError, match="is no origin"):
        settings_of(cors_origins=(origin,))
