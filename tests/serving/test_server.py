"""The server against its own engine, in process: shapes, refusals, paths around the guard."""

from __future__ import annotations

import dataclasses
import json

import pytest
from starlette.testclient import TestClient

from safe_decode.certificate import Certificate
from safe_decode.engines.rows import Row, RowRequest, Sampling
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.serving.app import create_app
from safe_decode.streaming.events import GuardText, Released
from tests.servers import MODEL, settings_of, staged_engine
from tests.staged import ATTACK, CALM, CALM_TEXT, KEPT, OPENER, staged


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(staged_engine(), settings_of())) as opened:
        yield opened


def ask(client, path="/v1/chat/completions", **body):
    if path == "/v1/chat/completions":
        body.setdefault("messages", CALM)
    return client.post(path, json={"model": MODEL, **body})


def chunks_of(response):
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_calm_answer_has_openai_s_shape_and_a_valid_certificate(client):
    body = ask(client).json()
    choice = body["choices"][0]
    assert body["object"] == "chat.completion" and choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == CALM_TEXT and choice["message"]["refusal"] is None
    assert choice["safety"]["action"] == "released"
    assert choice["safety"]["certificate"]["status"] == "valid"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 20


def test_streamed_and_whole_say_the_same(client):
    for messages in (CALM, ATTACK):
        whole = ask(client, messages=messages, seed=1).json()["choices"][0]
        chunks = chunks_of(ask(client, messages=messages, seed=1, stream=True))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(d.get("content") or "" for d in deltas) == whole["message"]["content"]
        told = "".join(d.get("refusal") or "" for d in deltas) or None
        assert told == whole["message"]["refusal"]
        last = chunks[-1]["choices"][0]
        assert last["finish_reason"] == whole["finish_reason"]
        assert last["safety"]["action"] == whole["safety"]["action"]


def test_a_trip_ends_with_content_filter_and_what_was_shown_stands(client):
    choice = ask(client, messages=ATTACK).json()["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["safety"]["action"] == "rewound"
    assert choice["message"]["refusal"].startswith(f" ... {OPENER}")
    assert choice["message"]["content"] == KEPT + choice["message"]["refusal"]


def test_scores_and_thresholds_stay_with_the_operator(client):
    for body in ({}, {"messages": ATTACK}, {"messages": ATTACK, "stream": True}):
        text = ask(client, **body).text
        for word in ("statistic", "threshold", "dropped", "risk", "trip_step"):
            assert f'"{word}"' not in text


def test_the_operator_may_expose_scores_and_what_was_taken_back():
    settings = settings_of(expose_scores=True, expose_bare=True)
    with TestClient(create_app(staged_engine(), settings)) as opened:
        chunks = chunks_of(ask(opened, "/page/guarded", messages=ATTACK, stream=True))
        bare = chunks_of(ask(opened, "/page/bare", messages=ATTACK, stream=True))
        facts = opened.get("/page/facts").json()
        assert "text/html" in opened.get("/").headers["content-type"]
    trip = next(c["choices"][0]["safety"]["trip"] for c in chunks if "trip" in str(c))
    threshold = facts["certificate"]["threshold"]
    assert trip["statistic"] > threshold and trip["risk"] > 0.5 and trip["dropped"]
    shown = [t for c in chunks[:-1] for t in c["choices"][0].get("safety", {}).get("tokens", [])]
    known = [token["statistic"] for token in shown if token["statistic"] is not None]
    assert known and max(known) <= threshold
    last = bare[-1]["choices"][0]
    assert last["safety"]["action"] == "flagged" and last["safety"]["unprotected"] is True


def test_the_bare_model_is_out_of_reach_unless_the_operator_shows_it(client):
    for path in ("/page/bare", "/page/guarded"):
        assert ask(client, path, messages=ATTACK).status_code in (404, 405)
    assert client.get("/page/app.py").status_code == 404
    assert client.get("/page/..%2fapp.py").status_code == 404


def test_the_server_says_what_the_decoder_says():
    """Engine and library agree on texts, outcomes and every score of the trace."""
    engine = staged_engine()
    decoder = engine._decoder
    prefills = [None, "0", "9", "Q", "yz", "0123", None]
    told, rows = [], []
    for prefill in prefills:
        given = [{"role": "assistant", "content": prefill}] if prefill else []
        events = []
        sampling = Sampling(max_tokens=64, seed=0)
        request = RowRequest(engine.chat([*CALM, *given]), sampling, engine.facts.policy)
        rows.append(Row(request, events.append))
        told.append(events)
    engine.run(rows)
    output = decoder.generate(
        [CALM] * len(rows), prefill=prefills, max_new_tokens=64, do_sample=False
    )
    assert any(row.trace.tripped for row in rows) and not all(row.trace.tripped for row in rows)
    for events, row, text, trace in zip(told, rows, output.texts, output.traces, strict=True):
        assert "".join(e.text for e in events if isinstance(e, Released | GuardText)) == text
        assert row.trace.end == trace.end and events[-1].outcome == trace.end.outcome
        mine = [step.statistic for step in row.trace.steps]
        assert mine == pytest.approx([step.statistic for step in trace.steps], abs=1e-4)


def test_a_row_s_draws_do_not_depend_on_its_neighbours():
    engine = staged_engine()
    prompt = engine.chat(CALM)

    def texts(samplings):
        told = [[] for _ in samplings]
        engine.run(
            [
                Row(RowRequest(prompt, sampling, engine.facts.policy), events.append)
                for sampling, events in zip(samplings, told, strict=True)
            ]
        )
        return [
            "".join(e.text for e in events if isinstance(e, Released | GuardText))
            for events in told
        ]

    samplings = [
        Sampling(max_tokens=24, seed=5, temperature=1.0),
        Sampling(max_tokens=9, seed=6, temperature=0.8, top_p=0.9),
        Sampling(max_tokens=30, seed=5, temperature=1.0, stop=(".",)),
        Sampling(max_tokens=16, seed=0),
    ]
    assert texts(samplings) == [texts([sampling])[0] for sampling in samplings]


def test_seed_repeats_and_n_gives_different_answers(client):
    body = {"temperature": 1.0, "seed": 11, "n": 3, "max_tokens": 24}
    first, again = (
        [c["message"]["content"] for c in ask(client, **body).json()["choices"]] for _ in range(2)
    )
    assert first == again and len(set(first)) > 1


def test_stop_strings_end_the_row_and_are_not_shown(client):
    whole = ask(client).json()["choices"][0]["message"]["content"]
    stop = whole[10:14]
    choice = ask(client, stop=[stop, "zzz"]).json()["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    streamed = chunks_of(ask(client, stop=stop, stream=True))
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in streamed)
    assert said == whole[: whole.index(stop)]


def test_a_cap_ends_with_length(client):
    choice = ask(client, max_tokens=5).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_usage_comes_last_when_asked_for(client):
    chunks = chunks_of(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 5
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_messages_have_anthropic_s_shape_and_refuse_by_stop_reason(client):
    body = {"max_tokens": 64, "messages": ATTACK}
    whole = ask(client, "/v1/messages", **body).json()
    assert whole["type"] == "message" and whole["stop_reason"] == "refusal"
    assert whole["content"][0]["text"] == KEPT + whole["safety"]["refusal"]
    assert whole["safety"]["action"] == "rewound"
    text = ask(client, "/v1/messages", stream=True, **body).text
    names = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert '"stop_reason":"refusal"' in text


def test_completions_take_text_and_ids(client):
    ids = list(staged_engine().chat(CALM).ids)
    body = ask(client, "/v1/completions", prompt=[ids, ids[:5]], max_tokens=12).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0]["text"] == CALM_TEXT[:12]
    assert ask(client, "/v1/completions", prompt="Sure,", max_tokens=4).status_code == 200


# Every path around the guard.


@pytest.mark.parametrize(
    ("extra", "stream"),
    [
        ({}, True),
        ({"n": 3}, False),
        ({"n": 3}, True),
        ({"logit_bias": {"5": 5.0}}, False),
        ({"temperature": 0.01, "seed": 3}, False),
        ({"stop": ["qqq"]}, True),
        ({"safety": {"redirect": "stop"}}, False),
        ({"safety": {"redirect": "refuse", "holdback_tokens": 20}}, True),
    ],
)
def test_no_parameter_leads_around_the_guard(client, extra, stream):
    response = ask(client, messages=ATTACK, stream=stream, **extra)
    ends = (
        [c["choices"][0] for c in chunks_of(response) if c["choices"][0].get("finish_reason")]
        if stream
        else response.json()["choices"]
    )
    assert len(ends) == extra.get("n", 1)
    assert {choice["finish_reason"] for choice in ends} == {"content_filter"}


def test_ids_of_a_chat_are_guarded_as_the_chat_is(client):
    ids = list(staged_engine().chat(ATTACK).ids)
    for stream in (False, True):
        response = ask(client, "/v1/completions", prompt=ids, max_tokens=64, stream=stream)
        assert "content_filter" in response.text


def test_one_token_at_a_time_trips_no_later_than_at_once(client):
    """A loop of max_tokens=1 hands back what was said: the prefill is judged in order."""

    def own(message):
        """The model's own words: what follows a trip is the guard's."""
        return message["content"].removesuffix(message["refusal"] or "")

    once = own(ask(client, messages=ATTACK).json()["choices"][0]["message"])
    said = ATTACK[-1]["content"]
    for _ in range(60):
        messages = [*ATTACK[:-1], {"role": "assistant", "content": said}]
        choice = ask(client, messages=messages, max_tokens=1).json()["choices"][0]
        said += own(choice["message"])
        if choice["finish_reason"] == "content_filter":
            break
    else:
        raise AssertionError("the loop never tripped")
    # At hold-back k one request shows less; token by token, at most those k letters more.
    assert said[1:].startswith(once) and len(said[1:]) <= len(once) + 2


@pytest.mark.parametrize(
    "safety",
    [
        {"redirect": "flag"},
        {"holdback_tokens": 0},
        {"alpha": 0.005},
        {"alpha": 0.9},
        {"on_error": "allow"},
        {"threshold": 99},
        {"enabled": False},
    ],
)
def test_a_client_can_never_weaken_the_guard(client, safety):
    response = ask(client, safety=safety)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("safety")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}),
        ("/v1/chat/completions", {"echo": True}),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {"modalities": ["audio"]}),
        ("/v1/chat/completions", {"n": 500}),
        ("/v1/chat/completions", {"guided_json": {}}),
        ("/v1/completions", {"prompt": "a", "echo": True}),
        ("/v1/completions", {"prompt": "a", "best_of": 2}),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}),
        ("/v1/completions", {"prompt": [10**9]}),
        ("/v1/completions", {"prompt": [[True]]}),
        ("/v1/completions", {"prompt": "<|user|>"}),
    ],
)
def test_what_is_not_supported_is_refused_in_openai_s_shape(client, path, body):
    response = ask(client, path, **body)
    if response.status_code == 200:  # text that spells a control token is ordinary text
        assert body["prompt"] == "<|user|>"
        return
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] and error["message"]


def test_a_foreign_model_is_not_found(client):
    response = client.post("/v1/chat/completions", json={"model": "x", "messages": []})
    assert response.status_code == 400
    body = {"model": "x", "messages": [{"role": "user", "content": "a"}]}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models").json()["data"][0]["id"] == MODEL


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "staged", "messages": NaN}',
        b'{"model": "\xff\xfe"}',
        b'{"model": "staged", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "staged", "temperature": 1e999, "messages": []}',
        b'{"model": 1, "messages": "x"}',
        b'{"model": "staged", "messages": [{"role": "user", "content": "\\u0000"}]}',
        b"x" * 1_000_001,
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
def test_hostile_bodies_are_refused_without_a_traceback(client, path, body):
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code < 500
    assert "Traceback" not in response.text and "File " not in response.text


def test_the_openapi_document_names_the_model_that_is_served(client):
    """So that clients made from it, and those that fuzz it, ask for one that exists."""
    document = client.get("/openapi.json").json()
    for ask_of in (
        *("ChatCompletionRequest", "CompletionRequest", "MessagesRequest"),
        *("ResponsesRequest", "CountTokensRequest", "TokenizeRequest"),
    ):
        assert document["components"]["schemas"][ask_of]["properties"]["model"]["enum"] == [MODEL]


def test_the_server_rules_by_the_population_that_it_was_started_for():
    stage = staged()
    letters = tuple(
        Certificate.compute(
            [1e9] * one.n,
            alpha=one.alpha,
            delta=one.delta,
            population="letters",
            envelope=one.envelope,
        )
        for one in stage.bundle.certificates
    )
    certificates = (*stage.bundle.certificates, *letters)
    bundle = dataclasses.replace(stage.bundle, certificates=certificates)
    trips = {}
    for population in ("benign", "letters"):
        decoder = SafeDecoder(stage.model, stage.tokenizer, bundle, population=population)
        engine = TransformersEngine(decoder, keep_traces=True)
        assert engine.facts.certificate.population == population
        sampling = Sampling(max_tokens=64, seed=0)
        request = RowRequest(engine.chat(ATTACK), sampling, engine.facts.policy)
        row = Row(request, lambda _event: None)
        engine.run([row])
        assert row.trace.header.population == population
        trips[population] = row.trace.tripped
        engine.close()
    assert trips == {"benign": True, "letters": False}
