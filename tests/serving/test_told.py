"""What a client learns of the guard: of tokens that were not judged or not shown, nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from starlette.testclient import TestClient

from safe_decode.certificate import Certificate
from safe_decode.engines.rows import Row, RowRequest, Sampling
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.serving.app import create_app
from safe_decode.serving.scheduling.response import pieces_of
from safe_decode.serving.schemas.requests import ChatMessage
from safe_decode.streaming.events import Finished, GuardText, Released
from tests.servers import MODEL, settings_of, staged_engine
from tests.staged import ATTACK, CALM, KEPT, OPENER, staged

CHAT, RAW, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(staged_engine(), settings_of())) as opened:
        yield opened


def body_of(path, messages=ATTACK, **extra):
    if path == RAW:
        return {"model": MODEL, "prompt": list(staged_engine().chat(messages).ids), **extra}
    own = {"max_tokens": 60} if path == MESSAGES else {}
    return {"model": MODEL, "messages": messages, **own, **extra}


def objects_of(response):
    """All JSON objects of an answer: its body, or the data of its events."""
    if "text/event-stream" not in response.headers["content-type"]:
        return [response.json()]
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def keys_of(value):
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


# Two trips, one released text.


@contextlib.contextmanager
def tripping_at(threshold):
    """An engine of the stage whose answers trip at another threshold, so at another place."""
    stage = staged()
    certificates = tuple(
        Certificate.compute(
            [threshold] * one.n,
            alpha=one.alpha,
            delta=one.delta,
            population=one.population,
            envelope=one.envelope,
        )
        for one in stage.bundle.certificates
    )
    bundle = dataclasses.replace(stage.bundle, certificates=certificates)
    engine = TransformersEngine(
        SafeDecoder(stage.model, stage.tokenizer, bundle, redirect="rewind")
    )
    yield engine
    engine.close()


def trip_of(engine):
    """Where the attack trips, what is released before, and how it comes."""
    events = []
    request = RowRequest(engine.chat(ATTACK), Sampling(max_tokens=64, seed=0), engine.facts.policy)
    engine.run([Row(request, events.append)])
    said = [e.text for e in events if isinstance(e, Released) and e.attempt == 0]
    (end,) = (e for e in events if isinstance(e, Finished))
    return end.trip_step, "".join(said), said


def seen(engine, path, **extra):
    """Everything a client sees, its ids, times and the name of the bundle left out."""
    with TestClient(create_app(engine, settings_of())) as opened:
        response = opened.post(path, json=body_of(path, seed=1, **extra))
    objects = objects_of(response)
    named = {o.get("id") or o.get("message", {}).get("id") for o in objects} - {None}
    times = {str(o["created"]) for o in objects if "created" in o}
    text = response.text
    for word in (*named, *times, engine.facts.bundle[:16], engine.facts.bundle[:12]):
        text = text.replace(word, "*")
    own = ("x-request-id", "x-safe-decode-bundle", "date")
    headers = sorted((k, v) for k, v in response.headers.items() if k not in own)
    return response.status_code, headers, text


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (CHAT, {}),
        (CHAT, {"logprobs": True, "return_token_ids": True}),
        (CHAT, {"stream": True}),
        (
            CHAT,
            {
                "stream": True,
                "logprobs": True,
                "return_token_ids": True,
                "stream_options": {"include_usage": True},
            },
        ),
        (RAW, {"max_tokens": 60, "logprobs": 0}),
        (RAW, {"max_tokens": 60, "stream": True, "logprobs": 0, "return_token_ids": True}),
    ],
)
def test_where_it_tripped_is_not_told_beyond_the_text_that_was_released(path, extra):
    told = []
    for threshold in (0.3, 0.8, 1.2):
        with tripping_at(threshold) as engine:
            told.append((*trip_of(engine), seen(engine, path, **extra)))
    steps, texts, pieces, answers = zip(*told, strict=True)
    assert len(set(steps)) == 3 and set(texts) == {KEPT}, "the stage: other trips, same text"
    assert pieces[0] != pieces[1], "the stage: what stands comes in other pieces"
    assert answers[0][0] == 200 and "content_filter" in answers[0][2]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("stream", [False, True])
def test_where_it_tripped_is_not_told_in_anthropic_s_shape(stream):
    told = []
    for threshold in (0.3, 1.2):
        with (
            tripping_at(threshold) as engine,
            TestClient(create_app(engine, settings_of())) as opened,
        ):
            objects = objects_of(opened.post(MESSAGES, json=body_of(MESSAGES, stream=stream)))
        text = json.dumps(objects).replace(engine.facts.bundle[:16], "*")
        mine = objects[0].get("id") or objects[0]["message"]["id"]
        told.append(text.replace(mine, "*"))
    assert told[0] == told[1] and '"refusal"' in told[0]


def test_what_stands_is_cut_into_tokens_and_nothing_else_is_cut():
    engine = staged_engine()
    events = []
    request = RowRequest(engine.chat(ATTACK), Sampling(max_tokens=64, seed=0), engine.facts.policy)
    engine.run([Row(request, events.append)])
    cut = [piece for event in events for piece in pieces_of(event)]
    said = [piece for piece in cut if isinstance(piece, Released | GuardText)]
    assert all(len(piece.notes) == 1 for piece in said if isinstance(piece, Released))
    assert "".join(p.text for p in said) == "".join(
        e.text for e in events if isinstance(e, Released | GuardText)
    )
    assert [e for e in cut if not isinstance(e, Released | GuardText)] == [
        e for e in events if not isinstance(e, Released | GuardText)
    ]
    whole = Released(0, "text without tokens", ())
    assert list(pieces_of(whole)) == [whole]


# What stands in an answer at all.

SAFETY = {"safety", "action", "certificate", "status", "why", "alpha", "confidence", "responses"}
SAFETY |= {"source"}
SAFETY |= {"population", "bundle", "refusal"}
OPENAI = {"id", "object", "created", "model", "system_fingerprint", "choices", "usage", "index"}
OPENAI |= {"finish_reason", "logprobs", "token", "logprob", "bytes", "top_logprobs", "content"}
OPENAI |= {"prompt_tokens", "completion_tokens", "total_tokens", "role", "message", "delta"}
OPENAI |= {"text", "tokens", "token_logprobs", "text_offset", "token_ids"}
ANTHROPIC = {"id", "type", "role", "model", "content", "text", "stop_reason", "stop_sequence"}
ANTHROPIC |= {"usage", "input_tokens", "output_tokens", "message", "index", "content_block"}
ANTHROPIC |= {"delta", "by", "token_ids"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("messages", [CALM, ATTACK])
@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (CHAT, {}),
        (CHAT, {"logprobs": True, "return_token_ids": True, "n": 2}),
        (CHAT, {"logit_bias": {"5": -3.0}, "presence_penalty": 0.5}),
        (CHAT, {"safety": {"redirect": "stop"}}),
        (RAW, {"max_tokens": 40, "logprobs": 0, "return_token_ids": True}),
        (RAW, {"max_tokens": 40, "safety": {"redirect": "refuse"}}),
        (MESSAGES, {}),
        (MESSAGES, {"return_token_ids": True, "stop_sequences": ["3"]}),
    ],
)
def test_answers_hold_these_fields_and_no_others(client, path, extra, messages, stream):
    if stream and path != MESSAGES:
        extra = {**extra, "stream_options": {"include_usage": True}}
    response = client.post(path, json=body_of(path, messages, stream=stream, **extra))
    assert response.status_code == 200
    known = SAFETY | (ANTHROPIC if path == MESSAGES else OPENAI)
    assert set().union(*map(keys_of, objects_of(response))) <= known
    allowed = {"content-type", "content-length", "cache-control", "x-request-id", "date"}
    allowed |= {"x-safe-decode-bundle", "x-accel-buffering", "connection", "transfer-encoding"}
    named = {name for name in response.headers if name not in allowed}
    assert all(
        name.startswith(("x-content-type", "x-frame", "referrer", "cross", "content-sec"))
        for name in named
    ), named


def test_dropped_words_reach_the_page_alone_whatever_is_exposed():
    settings = settings_of(expose_scores=True, expose_bare=True, expose_alternatives=True)
    with TestClient(create_app(staged_engine(), settings)) as opened:
        for path in (CHAT, RAW, MESSAGES):
            for stream in (False, True):
                text = opened.post(path, json=body_of(path, stream=stream)).text
                for word in ("dropped", "trip_step"):
                    assert f'"{word}' not in text
        shown = objects_of(opened.post("/page/guarded", json=body_of(CHAT, stream=True)))
    trip = next(o["choices"][0]["safety"]["trip"] for o in shown if '"trip"' in json.dumps(o))
    assert len(trip["dropped"]) == trip["dropped_tokens"] > 0


# Log-probabilities.


@pytest.mark.parametrize(
    ("path", "extra", "param"),
    [
        (CHAT, {"logprobs": True, "top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 5, "logit_bias": {"5": 100.0}}, "top_logprobs"),
        (CHAT, {"logprobs": True, "logit_bias": {"5": 100.0}}, "logprobs"),
        (CHAT, {"logprobs": True, "presence_penalty": 2.0}, "logprobs"),
        (CHAT, {"logprobs": True, "frequency_penalty": -2.0}, "logprobs"),
        (RAW, {"logprobs": 1}, "logprobs"),
        (RAW, {"logprobs": 5}, "logprobs"),
        (RAW, {"logprobs": 0, "logit_bias": {"5": 1.0}}, "logprobs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_alternatives_are_refused_by_name(client, path, extra, param, stream):
    response = client.post(path, json=body_of(path, stream=stream, **extra))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and "not judged" in error["message"]
    assert error["code"] == "unsupported_parameter"


def test_log_probabilities_of_chosen_tokens_stand_without_alternatives(client):
    nothing = {"logit_bias": {"5": 0.0}, "presence_penalty": 0.0}
    body = body_of(CHAT, logprobs=True, top_logprobs=0, **nothing)
    choice = client.post(CHAT, json=body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == KEPT
    assert all(entry["logprob"] <= 0 and entry["top_logprobs"] == [] for entry in content)
    raw = client.post(RAW, json=body_of(RAW, max_tokens=40, logprobs=0)).json()["choices"][0]
    assert set(map(len, raw["logprobs"]["top_logprobs"])) == {0}
    assert "".join(raw["logprobs"]["tokens"]) == KEPT


def test_the_operator_may_expose_alternatives():
    with TestClient(create_app(staged_engine(), settings_of(expose_alternatives=True))) as opened:
        body = body_of(CHAT, CALM, logprobs=True, top_logprobs=2, logit_bias={"5": 1.0})
        entries = opened.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
        raw = opened.post(RAW, json=body_of(RAW, CALM, logprobs=3)).json()["choices"][0]
    for entry in entries:
        likeliest = max(other["logprob"] for other in entry["top_logprobs"])
        assert len(entry["top_logprobs"]) == 2 and likeliest >= entry["logprob"] - 1e-6
    assert set(map(len, raw["logprobs"]["top_logprobs"])) == {3}


def test_after_a_trip_no_log_probability_follows(client):
    chunks = objects_of(client.post(CHAT, json=body_of(CHAT, stream=True, logprobs=True)))
    tripped = next(i for i, c in enumerate(chunks) if c["choices"][0]["delta"].get("refusal"))
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks[tripped:])


# The refusal.


@pytest.mark.parametrize("as_content", [True, False])
def test_a_refusal_is_content_unless_the_operator_keeps_it_apart(as_content):
    settings = settings_of() if as_content else settings_of(refusal_as_content=False)
    with TestClient(create_app(staged_engine(), settings)) as opened:
        message = opened.post(CHAT, json=body_of(CHAT)).json()["choices"][0]["message"]
        text = opened.post(RAW, json=body_of(RAW, max_tokens=60)).json()["choices"][0]
        chunks = objects_of(opened.post(CHAT, json=body_of(CHAT, stream=True)))
        told = opened.post(MESSAGES, json=body_of(MESSAGES)).json()
        events = objects_of(opened.post(MESSAGES, json=body_of(MESSAGES, stream=True)))
    said = message["refusal"]
    assert said.startswith(f" ... {OPENER}")
    wanted = KEPT + said if as_content else KEPT
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert message["content"] == text["text"] == wanted
    assert "".join(delta.get("content") or "" for delta in deltas) == wanted
    assert "".join(delta.get("refusal") or "" for delta in deltas) == text["refusal"] == said
    assert [block["text"] for block in told["content"]] == [wanted]
    assert told["stop_reason"] == "refusal" and told["safety"]["refusal"] == said
    assert "".join(e.get("delta", {}).get("text", "") for e in events) == wanted


def test_a_refusal_that_is_handed_back_is_read_once():
    both = ChatMessage(role="assistant", content="So far. No.", refusal=" No.")
    apart = ChatMessage(role="assistant", content="So far.", refusal=" No.")
    alone = ChatMessage(role="assistant", content=None, refusal="No.")
    assert both.as_text() == apart.as_text() == "So far. No." and alone.as_text() == "No."
