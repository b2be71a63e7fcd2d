"""The server in operation: queues, cancellation, keys, metrics, audit, canary, failure, proxy."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import httpx2
import pytest
from starlette.testclient import TestClient

from safe_decode.errors import CanaryError, ConfigurationError
from safe_decode.serving.app import create_app
from safe_decode.serving.audit import AuditLog
from safe_decode.serving.middleware import SafetyMiddleware
from safe_decode.serving.relay import Relay
from safe_decode.serving.rows import Finished, Row, RowRequest, Said, Sampling, TokenNote
from safe_decode.serving.settings import load_settings
from tests.serving import MODEL, settings_of, staged_engine
from tests.staged import ATTACK, CALM, CALM_TEXT

BODY = {"model": MODEL, "messages": CALM}


class SlowEngine:
    """The staged engine's prompts and facts; rows wait until they are let go or cancelled."""

    def __init__(self):
        self._real = staged_engine()
        self.facts = self._real.facts
        self.go, self.began = threading.Event(), threading.Event()
        self.runs = []

    def chat(self, messages):
        return self._real.chat(messages)

    def completion(self, prompt):
        return self._real.completion(prompt)

    def token_text(self, token):
        return self._real.token_text(token)

    def admits(self, _rows, _row):
        return True

    def check(self):
        return 0.0

    def run(self, rows):
        self.runs.append(len(rows))
        self.began.set()
        left = list(rows)
        while left:
            for row in list(left):
                if row.is_cancelled:
                    row.emit(Finished("cancelled"))
                    left.remove(row)
            if self.go.is_set():
                for row in left:
                    row.emit(Said("done", (TokenNote(7, "done"),)))
                    row.emit(Finished("stop", outcome="released", shown_tokens=1))
                return
            time.sleep(0.005)


def post_in_thread(client, body):
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(client.post("/v1/chat/completions", json=body))
    )
    thread.start()
    return thread, answers


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def test_a_full_queue_is_refused_with_429_and_retry_after():
    engine = SlowEngine()
    app = create_app(engine, settings_of(max_queue=1, max_batch=1))
    with TestClient(app) as client:
        threads = [post_in_thread(client, BODY)]
        assert engine.began.wait(10)
        threads.append(post_in_thread(client, BODY))
        wait_for(lambda: app.state.service.scheduler.in_flight == 2)
        refused = client.post("/v1/chat/completions", json=BODY)
        engine.go.set()
        for thread, _ in threads:
            thread.join(10)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert [answers[0].status_code for _, answers in threads] == [200, 200]


def test_waiting_rows_share_the_next_run():
    engine = SlowEngine()
    app = create_app(engine, settings_of())
    with TestClient(app) as client:
        first = post_in_thread(client, BODY)
        assert engine.began.wait(10)
        later = [post_in_thread(client, BODY) for _ in range(3)]
        wait_for(lambda: app.state.service.scheduler.in_flight == 4)
        engine.go.set()
        for thread, _ in (first, *later):
            thread.join(10)
    assert engine.runs == [1, 3]


def test_one_key_cannot_take_all():
    engine = SlowEngine()
    settings = settings_of(max_rows_per_key=1, api_keys=["a", "b"])
    with TestClient(create_app(engine, settings)) as client:
        bearer = {"authorization": "Bearer a"}
        two = client.post("/v1/chat/completions", json={**BODY, "n": 2}, headers=bearer)
        engine.go.set()
        other = client.post("/v1/chat/completions", json=BODY, headers={"x-api-key": "b"})
    assert two.status_code == 429 and two.json()["error"]["code"] == "rate_limit"
    assert other.status_code == 200


def test_a_request_that_takes_too_long_is_ended():
    engine = SlowEngine()
    with TestClient(create_app(engine, settings_of(request_timeout_s=0.2))) as client:
        answer = client.post("/v1/chat/completions", json=BODY)
    assert answer.status_code == 503 and "retry-after" in answer.headers


def test_rows_that_are_left_when_the_server_ends_get_an_end():
    engine = SlowEngine()
    app = create_app(engine, settings_of())
    with TestClient(app) as client:
        thread, answers = post_in_thread(client, {**BODY, "stream": True})
        assert engine.began.wait(10)
        client.portal.call(app.state.service.scheduler.drain, 0.1)
        thread.join(10)
        assert client.get("/readyz").status_code == 503
        assert client.post("/v1/chat/completions", json=BODY).status_code == 503
    assert '"finish_reason":"length"' in answers[0].text and "[DONE]" in answers[0].text


def test_a_cancelled_row_leaves_its_neighbours_alone():
    engine = staged_engine()
    prompt = engine.chat(CALM)
    request = RowRequest(prompt, Sampling(max_tokens=64, seed=0), engine.facts.policy)
    told = [[], [], []]
    rows = [Row(request, events.append) for events in told]
    rows[1].cancel()
    engine.run(rows)
    assert [events[-1].reason for events in told] == ["stop", "cancelled", "stop"]
    assert told[1] == [Finished("cancelled")]
    texts = ["".join(e.text for e in told[i] if isinstance(e, Said)) for i in (0, 2)]
    assert texts == [CALM_TEXT, CALM_TEXT]


class FailingCanary(SlowEngine):
    def check(self):
        raise CanaryError("score 3 of the canary differs by 9, wanted at most 0.1.")


def test_nothing_is_served_when_the_canary_fails():
    with TestClient(create_app(FailingCanary(), settings_of())) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 503
        refused = client.post("/v1/chat/completions", json=BODY)
    assert refused.status_code == 503 and "retry-after" in refused.headers


def test_keys_are_wanted_where_there_are_some_and_never_told():
    settings = settings_of(api_keys=["secret-1"], operator_keys=["op"], expose_bare=True)
    with TestClient(create_app(SlowEngine(), settings)) as client:
        for headers in ({}, {"authorization": "Bearer no"}, {"x-api-key": "secret"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/metrics", headers=headers).status_code == 401
        good = {"authorization": "Bearer secret-1"}
        assert client.get("/v1/models", headers=good).status_code == 200
        assert client.get("/metrics", headers={"x-api-key": "op"}).status_code == 200
        assert client.get("/page/page.css").status_code == 200
        assert client.post("/page/bare", json=BODY).status_code == 401
        wrong = client.post("/v1/messages", json={})
        assert wrong.status_code == 401 and wrong.json()["type"] == "error"
    assert "secret-1" not in repr(settings)


def test_engine_failure_in_mid_stream_is_closed_with_a_last_chunk(monkeypatch, caplog):
    engine = staged_engine()
    model = engine._decoder.model
    calls, real = [0], model.forward

    def failing(*args, **kwargs):
        calls[0] += 1
        if calls[0] > 6:
            raise RuntimeError("the device is gone")
        return real(*args, **kwargs)

    with TestClient(create_app(engine, settings_of())) as client:
        monkeypatch.setattr(model, "forward", failing)
        answer = client.post("/v1/chat/completions", json={**BODY, "stream": True})
        monkeypatch.undo()
        assert '"finish_reason":"content_filter"' in answer.text
        assert '"action":"closed"' in answer.text and answer.text.rstrip().endswith("[DONE]")
        assert "device is gone" not in answer.text
        assert "safe_decode_guard_failures_total 1.0" in client.get("/metrics").text
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200
    assert "a run of 1 rows failed" in caplog.text


def test_nan_in_mid_stream_closes_its_row(monkeypatch):
    engine = staged_engine()
    model = engine._decoder.model
    calls, real = [0], model.forward

    def poisoned(*args, **kwargs):
        calls[0] += 1
        output = real(*args, **kwargs)
        if calls[0] > 5:
            output.logits[:] = float("nan")
        return output

    with TestClient(create_app(engine, settings_of())) as client:
        monkeypatch.setattr(model, "forward", poisoned)
        body = {**BODY, "temperature": 0.01, "n": 2}
        answer = client.post("/v1/chat/completions", json=body).json()
    assert [c["safety"]["action"] for c in answer["choices"]] == ["closed", "closed"]
    assert {c["finish_reason"] for c in answer["choices"]} == {"content_filter"}


def test_the_audit_log_has_a_line_a_response_and_no_text(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_text('{"cut off')  # what a killed process left
    with TestClient(create_app(staged_engine(), settings_of(audit=path))) as client:
        for messages in (CALM, ATTACK):
            client.post("/v1/chat/completions", json={**BODY, "messages": messages})
    first, *lines = path.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert first == '{"cut off' and [r["action"] for r in records] == ["released", "rewound"]
    assert records[1]["trip_step"] > 0 and records[1]["certificate"] == "valid"
    text = "\n".join(lines)
    assert "mirror" not in text and "polish" not in text and "ids" not in text


def test_an_audit_log_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be written"):
        AuditLog(tmp_path / "nowhere" / "log")


def test_settings_come_from_flags_environment_and_yaml_in_this_order(tmp_path, monkeypatch):
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nhost: yaml\nmax_batch: 3\n")
    monkeypatch.setenv("SAFE_DECODE_PORT", "2")
    monkeypatch.setenv("SAFE_DECODE_HOST", "environment")
    settings = load_settings(file, port=3)
    assert (settings.port, settings.host, settings.max_batch) == (3, "environment", 3)


@pytest.mark.parametrize(
    ("text", "flags", "told"),
    [
        ("redirect: flag", {}, "redirect"),
        ("on_error: allow", {}, "on_error"),
        ("- a", {}, "mapping"),
        ("port: [", {}, "cannot be read"),
        ("", {"alpha": 2.0}, "alpha"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text, flags, told):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=told):
        load_settings(file, **flags)


# The proxy.


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


async def ask_through(app, ask, **options):
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app)) as inner:
        marker = staged_engine().facts.bundle
        proxy = SafetyMiddleware(app, upstream="http://up", bundle=marker, client=inner, **options)
        transport = httpx2.ASGITransport(app=proxy)
        async with httpx2.AsyncClient(transport=transport, base_url="http://proxy") as outer:
            return await outer.post("/v1/chat/completions", json=ask)


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
    assert answer.status_code in (404, 503) and "unguarded" not in answer.text


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
