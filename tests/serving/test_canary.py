"""The canary while serving: repeated, run on change, and nothing is served once it fails."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext

import pytest
import torch
from starlette.testclient import TestClient

from safe_decode.cli.loading import decoder_of
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import CanaryError, FingerprintMismatchError
from safe_decode.loading import LoadSettings
from safe_decode.serving.app import create_app
from safe_decode.serving.operations.canary_watch import CanaryWatch
from safe_decode.serving.operations.metrics import Metrics
from tests.servers import MODEL, settings_of
from tests.serving.test_operation import SlowEngine, post_in_thread, sample, wait_for
from tests.staged import CALM, staged

BODY = {"model": MODEL, "messages": CALM}


class ChangingEngine(SlowEngine):
    """Its canary fails while `is_broken`; it says that it has changed while `says_changed`."""

    def __init__(self):
        super().__init__()
        self.is_broken = self.says_changed = False
        self.checks = []
        self.error = CanaryError("score 3 of the canary differs by 9, wanted at most 0.1.")

    def has_changed(self):
        return self.says_changed

    def check(self):
        self.says_changed = False
        self.checks.append((threading.current_thread().name, self.began.is_set()))
        if self.is_broken:
            raise self.error
        return 0.0


def status(client):
    return client.get("/readyz").status_code


def serving(engine, **changes):
    return TestClient(create_app(engine, settings_of(**{"canary_every_s": 0.05, **changes})))


def test_the_canary_is_repeated_off_the_event_loop():
    engine = ChangingEngine()
    with serving(engine):
        wait_for(lambda: len(engine.checks) >= 4)
    names = {name for name, _ in engine.checks[1:]}
    assert names == {"safe-decode-canary"}
    n_checks = len(engine.checks)
    time.sleep(0.3)
    assert len(engine.checks) <= n_checks + 1  # it ends with the server


@pytest.mark.parametrize(
    "error",
    [CanaryError("score 3 of the canary differs by 9."), RuntimeError("the device is gone")],
)
def test_a_canary_that_fails_ends_the_service_until_a_later_one_passes(caplog, error):
    engine = ChangingEngine()
    engine.error = error
    engine.go.set()
    with serving(engine) as client:
        assert status(client) == 200
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200
        engine.is_broken = True
        wait_for(lambda: status(client) == 503)
        refused = client.post("/v1/chat/completions", json=BODY)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "not_ready"
        assert client.get("/healthz").status_code == 200
        text = client.get("/metrics").text
        assert sample(text, "safe_decode_ready") == 0
        assert sample(text, 'safe_decode_canary_runs_total{result="failed"}') >= 1
        assert "the canary failed, nothing is served" in caplog.text
        engine.is_broken = False
        wait_for(lambda: status(client) == 200)
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200
        assert sample(client.get("/metrics").text, "safe_decode_ready") == 1


def test_a_canary_that_fails_ends_running_rows_closed_and_refuses_those_that_wait():
    engine = ChangingEngine()
    app = create_app(engine, settings_of(canary_every_s=0.05, max_batch=1))
    with TestClient(app) as client:
        streamed = post_in_thread(client, {**BODY, "stream": True})
        assert engine.began.wait(10)
        waits = post_in_thread(client, BODY)
        wait_for(lambda: app.state.service.scheduler.in_flight == 2)
        engine.is_broken = True
        for thread, _ in (streamed, waits):
            thread.join(20)
            assert not thread.is_alive()
        text = client.get("/metrics").text
    answer = streamed[1][0].text
    assert '"finish_reason":"content_filter"' in answer and '"action":"closed"' in answer
    assert answer.rstrip().endswith("[DONE]") and "done" not in answer.replace("[DONE]", "")
    assert waits[1][0].status_code == 503
    assert waits[1][0].json()["error"]["code"] == "not_ready"
    assert sample(text, "safe_decode_guard_failures_total") == 1
    assert engine.runs == [1]


def test_the_canary_waits_for_a_gap_between_runs_and_holds_the_next_run_back():
    """A run of less than a second ends before the canary begins; the next begins after it."""
    told = []

    class Telling(ChangingEngine):
        def check(self):
            told.append("canary begins")
            time.sleep(0.1)
            told.append("canary ends")
            return super().check()

        def run(self, rows):
            told.append("run begins")
            time.sleep(0.15)
            super().run(rows)
            told.append("run ends")

    engine = Telling()
    engine.go.set()
    with serving(engine, max_batch=1) as client:
        threads = [post_in_thread(client, BODY)[0] for _ in range(6)]
        for thread in threads:
            thread.join(20)
        wait_for(lambda: told.count("run ends") == 6)
    assert told.count("canary begins") >= 3
    pairs = list(zip(told[::2], told[1::2], strict=False))
    assert all(one.split()[0] == other.split()[0] for one, other in pairs), told


def test_a_change_that_the_engine_reports_is_looked_at_before_the_next_row_runs():
    engine = ChangingEngine()
    engine.go.set()
    with serving(engine, canary_every_s=3600) as client:
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200
        assert len(engine.checks) == 1
        engine.says_changed = True
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200
        assert len(engine.checks) == 2 and status(client) == 200
        engine.says_changed = engine.is_broken = True
        refused = client.post("/v1/chat/completions", json=BODY)
        assert refused.status_code == 503 and status(client) == 503
    assert engine.runs == [1, 1]


def test_an_engine_that_cannot_say_whether_it_changed_is_looked_at():
    class Mute(ChangingEngine):
        def has_changed(self):
            raise RuntimeError("no answer")

    engine = Mute()
    engine.go.set()
    with serving(engine, canary_every_s=3600) as client:
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200
    assert len(engine.checks) == 3


def test_nothing_is_sound_before_the_first_canary():
    watch = CanaryWatch(
        ChangingEngine(), Metrics(), every_s=1, pause=nullcontext, on_failure=lambda: None
    )
    assert not watch.is_sound and watch.check() and watch.is_sound


def test_a_decoder_checks_itself():
    stage = staged()
    decoder = SafeDecoder(stage.model, stage.tokenizer, stage.bundle)
    assert 0 <= decoder.check() <= stage.bundle.canary.tolerance
    weight = next(stage.model.parameters())
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        with pytest.raises(FingerprintMismatchError, match="weights of"):
            decoder.check()
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    # What no sign of the model shows, its scores do.
    hook = stage.model.model.layers[0].register_forward_hook(lambda _m, _i, out: out * 0)
    try:
        with pytest.raises(CanaryError, match="canary differs by"):
            decoder.check()
    finally:
        hook.remove()
    assert decoder.check() <= stage.bundle.canary.tolerance


def test_a_decoder_without_a_canary_says_so():
    from dataclasses import replace

    stage = staged()
    decoder = SafeDecoder(stage.model, stage.tokenizer, replace(stage.bundle, canary=None))
    with pytest.raises(CanaryError, match="has no canary"):
        decoder.check()


def test_the_embedded_model_whose_weights_are_zeroed_in_mid_service_serves_no_more():
    decoder = decoder_of(
        None,
        None,
        redirect="rewind",
        alpha=None,
        population="benign",
        how=LoadSettings(),
    )
    engine = TransformersEngine(decoder)
    weights = {name: w.detach().clone() for name, w in decoder.model.named_parameters()}
    try:
        with serving(engine, canary_every_s=0.2) as client:
            body = {**BODY, "max_tokens": 8}
            assert status(client) == 200
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            with torch.no_grad():
                for weight in decoder.model.parameters():
                    weight.zero_()
            wait_for(lambda: status(client) == 503)
            assert client.post("/v1/chat/completions", json=body).status_code == 503
            with torch.no_grad():
                for name, weight in decoder.model.named_parameters():
                    weight.copy_(weights[name])
            wait_for(lambda: status(client) == 200)
            assert client.post("/v1/chat/completions", json=body).status_code == 200
    finally:
        engine.close()
