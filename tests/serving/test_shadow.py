"""The shadow: answers are the bare model's, and what would have been done to them is told."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from safe_decode.serving.app import create_app
from safe_decode.serving.proxy.fields import safety_of
from tests.servers import MODEL, settings_of, staged_engine
from tests.staged import ATTACK, CALM, CALM_TEXT, KEPT

PATHS = {
    "/v1/chat/completions": {"messages": None},
    "/v1/messages": {"messages": None, "max_tokens": 60},
    "/v1/responses": {"input": None},
}


def ask(client, path, messages, key=None, **extra):
    body = {name: messages if value is None else value for name, value in PATHS[path].items()}
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return client.post(path, json={"model": MODEL, **body, **extra}, headers=headers)


def told(response):
    """What an answer says, and its safety object, whatever its shape."""
    body = response.json()
    if "choices" in body:
        (choice,) = body["choices"]
        return choice["message"]["content"], choice["safety"]
    content = body["output"][0]["content"] if "output" in body else body["content"]
    return "".join(part["text"] for part in content), body["safety"]


@pytest.fixture(scope="module")
def shadow():
    settings = settings_of(shadow_endpoints=tuple(PATHS))
    with TestClient(create_app(staged_engine(), settings)) as opened:
        yield opened


@pytest.fixture(scope="module")
def bare_text():
    """What the bare model says to the attack."""
    with TestClient(create_app(staged_engine(), settings_of(expose_bare=True))) as opened:
        body = {"model": MODEL, "messages": ATTACK}
        lines = opened.post("/page/bare", json=body).text.splitlines()
    chunks = [json.loads(x[6:]) for x in lines if x.startswith("data: ") and x != "data: [DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@pytest.mark.parametrize("path", PATHS)
def test_answers_of_the_shadow_are_the_bare_model_s_and_say_what_would_have_been(
    shadow, bare_text, path
):
    said, safety = told(ask(shadow, path, ATTACK))
    assert said == bare_text and said.startswith(KEPT) and len(said) > len(KEPT) + 5
    assert safety["would_block"] is True and safety["unprotected"] is True
    assert safety["action"] == "flagged"
    said, safety = told(ask(shadow, path, CALM))
    assert said == CALM_TEXT and safety["would_block"] is False
    assert safety["action"] == "released" and "unprotected" not in safety


def test_streams_of_the_shadow_say_it_at_their_end(shadow):
    text = ask(shadow, "/v1/chat/completions", ATTACK, stream=True).text
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines[:-1]]
    (last,) = [c["choices"][0] for c in chunks if c["choices"][0].get("finish_reason")]
    assert last["safety"]["would_block"] is True and "content_filter" not in text


def test_a_client_of_the_shadow_may_ask_to_be_guarded(shadow):
    said, safety = told(ask(shadow, "/v1/chat/completions", ATTACK, safety={"redirect": "refuse"}))
    assert safety["action"] == "refused" and "would_block" not in safety
    assert "bcdefgh" not in said
    # Anything else that tightens leaves the shadow as it is.
    _, safety = told(ask(shadow, "/v1/chat/completions", ATTACK, safety={"holdback_tokens": 9}))
    assert safety["would_block"] is True


def test_the_shadow_of_a_key_is_no_other_key_s_and_the_page_s_guard_stays():
    settings = settings_of(api_keys=("guarded",), shadow_keys=("watched",), expose_bare=True)
    with TestClient(create_app(staged_engine(), settings)) as opened:
        path = "/v1/chat/completions"
        assert told(ask(opened, path, ATTACK, "watched"))[1]["would_block"] is True
        guarded = told(ask(opened, path, ATTACK, "guarded"))[1]
        assert guarded["action"] == "rewound" and "would_block" not in guarded
        assert ask(opened, path, ATTACK).status_code == 401
        page = opened.post(
            "/page/guarded",
            json={"model": MODEL, "messages": ATTACK},
            headers={"authorization": "Bearer watched"},
        )
        assert "content_filter" in page.text


def test_nobody_is_in_the_shadow_unless_the_operator_says_so():
    with TestClient(create_app(staged_engine(), settings_of())) as opened:
        for extra in ({"safety": {"redirect": "flag"}}, {"shadow": True}, {"action": "flag"}):
            assert ask(opened, "/v1/chat/completions", ATTACK, **extra).status_code == 400
    with pytest.raises(ValueError, match="redirect"):
        settings_of(redirect="flag")
    with pytest.raises(ValueError, match="shadow_endpoints"):
        settings_of(shadow_endpoints=("/page/guarded",))


def test_operators_see_what_would_have_happened(tmp_path):
    path = tmp_path / "audit.jsonl"
    settings = settings_of(shadow_endpoints=("/v1/messages",), audit=path)
    with TestClient(create_app(staged_engine(), settings)) as opened:
        for messages in (ATTACK, CALM):
            ask(opened, "/v1/messages", messages)
        ask(opened, "/v1/chat/completions", ATTACK)
        metrics = opened.get("/metrics").text
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["would_block"] for r in records] == [True, False, None]
    assert [r["would_redirect"] for r in records] == ["rewind", None, None]
    assert [r["redirect"] for r in records] == ["flag", "flag", "rewind"]
    assert 'safe_decode_shadow_rows_total{endpoint="message"} 2.0' in metrics
    blocked = 'safe_decode_would_block_total{action="rewind",category="harm",endpoint="message"}'
    assert f"{blocked} 1.0" in metrics
    assert 'safe_decode_trips_total{action="rewound",category="harm"} 1.0' in metrics
    assert 'safe_decode_trips_total{action="flagged"' not in metrics


def test_the_proxy_takes_no_answer_that_nothing_protected(shadow):
    mark = staged_engine().facts.bundle[:16]
    _, safety = told(ask(shadow, "/v1/chat/completions", ATTACK))
    with pytest.raises(ValueError, match="not protected"):
        safety_of(safety, mark)
