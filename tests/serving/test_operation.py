"""The server in operation: queues, cancellation, keys, metrics, audit, canary, failure."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
from starlette.testclient import TestClient

from safe_decode.engines.rows import Row, RowRequest, Sampling
from safe_decode.engines.transformers.batch.timing import TimedLoop
from safe_decode.errors import CanaryError, ConfigurationError
from safe_decode.serving.app import create_app
from safe_decode.serving.operations.audit import AuditLog
from safe_decode.session.session import SessionRow
from safe_decode.streaming.events import Finished, GuardText, Released, TokenNote
from tests.servers import MODEL, settings_of, staged_engine
from tests.staged import ATTACK, CALM, CALM_TEXT

BODY = {"model": MODEL, "messages": CALM}


class SlowEngine:
    """The staged engine's prompts and facts; rows wait until they are let go or cancelled."""

    def __init__(self):
        self._real = staged_engine()
        self.facts = self._real.facts
        self.go, self.began = threading.Event(), threading.Event()
        self.runs = []

    def chat(self, messages, **options):
        return self._real.chat(messages, **options)

    def completion(self, prompt):
        return self._real.completion(prompt)

    def token_text(self, token):
        return self._real.token_text(token)

    def admits(self, _rows, _row):
        return True

    def has_changed(self):
        return False

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
                    row.emit(Released(0, "done", (7,), notes=(TokenNote(7, "done"),)))
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
    request = RowRequest(
        prompt, Sampling(max_tokens=engine.facts.certified_cap, seed=0), engine.facts.policy
    )
    told = [[], [], []]
    rows = [Row(request, events.append) for events in told]
    rows[1].cancel()
    engine.run(rows)
    assert [events[-1].reason for events in told] == ["stop", "cancelled", "stop"]
    assert told[1] == [Finished("cancelled")]
    texts = [
        "".join(e.text for e in told[i] if isinstance(e, Released | GuardText)) for i in (0, 2)
    ]
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
    assert records[1]["trip_step"] > 0 and records[0]["certificate"] == "valid"
    # A beginning counts, so what is left open is as long as is covered behind it.
    assert records[1]["certificate"] == "valid" and records[1]["prefill_tokens"] == 1
    assert records[1]["changed"] == {}
    text = "\n".join(lines)
    assert "mirror" not in text and "polish" not in text and "ids" not in text


def test_an_audit_log_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be written"):
        AuditLog(tmp_path / "nowhere" / "log")


def sample(text, name):
    """Read one number of an exposition."""
    return float(next(x for x in text.splitlines() if x.startswith(f"{name} ")).split()[1])


def test_metrics_tell_times_to_and_between_tokens_and_the_guard_s_own_share():
    with TestClient(create_app(staged_engine(), settings_of())) as client:
        for messages in (CALM, ATTACK):
            client.post("/v1/chat/completions", json={**BODY, "messages": messages})
        text = client.get("/metrics").text
    assert sample(text, "safe_decode_ttft_seconds_count") == 2
    assert sample(text, "safe_decode_tpot_seconds_count") == 2
    steps = sample(text, "safe_decode_step_seconds_count")
    # One observation a chosen token: the calm answer's and its end, and the attack's to its trip.
    assert steps == sample(text, "safe_decode_guard_seconds_count")
    assert steps >= len(CALM_TEXT) + 1
    own, whole = (sample(text, f"safe_decode_{of}_seconds_sum") for of in ("guard", "step"))
    assert 0 < own < whole
    assert 'safe_decode_trips_total{action="rewound",category="harm"} 1.0' in text


def test_telling_readers_is_not_the_guard_s_time():
    """What the follower takes is left out of the guard's own time."""

    class Slow:
        def on_choice(self, *_):
            time.sleep(0.02)

        def on_end(self, *_):
            pass

    engine = staged_engine()
    guard, model = engine._guard, engine._decoder.model
    ids = torch.tensor([engine.chat(CALM).ids])
    with guard.protected.tap.listening() as recorder, torch.no_grad():
        row = SessionRow(9.0, engine._decoder.policy)
        session = guard.protected.session([row], recorder)
        loop = TimedLoop(session, follower=Slow())
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=loop,
            do_sample=False,
            max_new_tokens=4,
        )
    n_steps = 4 + engine._decoder.policy.holdback_tokens  # unseen tokens behind the cap
    assert len(loop.times.guard_s) == len(loop.times.step_s) == n_steps
    assert all(step >= 0.02 for step in loop.times.step_s)
    assert sum(loop.times.guard_s) < sum(loop.times.step_s) - n_steps * 0.02
