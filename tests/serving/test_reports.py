"""Reports that users of other servers have filed, each as a test of its kind.

A client sends what it always sends; a server refuses it, or answers in a way that the client
cannot show. Each test sends the request in the shape in which the client writes it.
"""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from safe_decode.serving.app import create_app
from safe_decode.serving.requests.admission import IGNORED
from safe_decode.serving.schemas.notice import WITHHELD
from tests.servers import MODEL, settings_of, staged_engine
from tests.staged import ATTACK, CALM, CALM_TEXT


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(staged_engine(), settings_of())) as opened:
        yield opened


def test_fields_that_an_sdk_adds_to_its_messages_do_not_fail_a_turn(client):
    """An SDK's own message, as it was parsed and is handed back, with all that it carries."""
    path = "/v1/chat/completions"
    first = client.post(path, json={"model": MODEL, "messages": CALM}).json()
    said = {
        **first["choices"][0]["message"],
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "reasoning_content": "hm",
        "id": "m1",
    }
    again = client.post(path, json={"model": MODEL, "messages": [*CALM, said, *CALM]})
    assert again.status_code == 200, again.text
    assert set(again.headers[IGNORED].split(", ")) == {"messages.reasoning_content", "messages.id"}
    plain = [*CALM, {"role": "assistant", "content": CALM_TEXT}, *CALM]
    bare = client.post(path, json={"model": MODEL, "messages": plain}).json()
    assert again.json()["usage"] == bare["usage"]


def test_a_field_of_a_local_server_does_not_keep_a_web_page_from_connecting(client):
    """A chat page sends keep_alive and session fields to whatever it talks to."""
    body = {
        "model": MODEL,
        "messages": CALM,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        "keep_alive": "5m",
        "num_ctx": 4096,
        "chat_id": "c",
        "session_id": "s",
        "metadata": {"user": {"id": 1}},
    }
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200 and response.text.rstrip().endswith("data: [DONE]")
    named = response.headers[IGNORED].split(", ")
    assert {"keep_alive", "num_ctx", "chat_id", "session_id", "metadata"} <= set(named)
    assert client.get("/v1/models").json()["data"][0]["id"] == MODEL


def test_an_sdk_that_speaks_the_newest_interface_by_default_is_answered(client):
    """A provider made with a base address of one's own still calls /v1/responses."""
    body = {
        "model": MODEL,
        "input": [
            {"role": "system", "content": "You help."},
            {"role": "user", "content": [{"type": "input_text", "text": "Help me."}]},
        ],
        "store": True,
        "include": ["reasoning.encrypted_content"],
        "text": {"verbosity": "low"},
        "stream": True,
    }
    response = client.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines]
    assert events[0]["type"] == "response.created" and events[-1]["type"] == "response.completed"
    said = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(said) == CALM_TEXT


def test_a_gateway_may_count_tokens_before_it_asks(client):
    """An agent counts its prompt through the gateway; without the endpoint it does not start."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Help me."}]}],
        "system": [{"type": "text", "text": "Help.", "cache_control": {"type": "ephemeral"}}],
        "tools": [],
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "token-counting"}
    path = "/v1/messages/count_tokens?beta=true"
    response = client.post(path, json=body, headers=headers)
    assert response.status_code == 200 and response.json()["input_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_filtered_turn_does_not_look_like_an_empty_one(client, stream):
    """An agent that sees neither content nor a refusal asks again until its turns are spent."""
    early = [*ATTACK[:-1], {"role": "assistant", "content": "0123456789abcdef"}]
    asked = {"model": MODEL, "messages": early, "stream": stream, "safety": {"redirect": "stop"}}
    response = client.post("/v1/chat/completions", json=asked)
    if not stream:
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "content_filter"
        assert choice["message"]["refusal"] == choice["message"]["content"] == WITHHELD
        return
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(c["delta"].get("refusal") or "" for c in choices) == WITHHELD
    assert "".join(c["delta"].get("content") or "" for c in choices) == WITHHELD
    assert choices[-1]["finish_reason"] == "content_filter"
