"""The server as a process, and its OpenAPI document fuzzed. Slow: each starts a server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from tests.servers import MODEL, running, settings_of, staged_engine
from tests.staged import CALM, CALM_TEXT, write

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
BODY = {"model": MODEL, "messages": CALM, "stream": True}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Arguments that serve the stage."""
    folder = tmp_path_factory.mktemp("stage")
    write(folder)
    model, bundle = str(folder / "model"), str(folder / "bundle")
    return ("--model", model, "--bundle", bundle, "--set", f"served_name={MODEL}")


def started(folder, *arguments):
    """Start the command; returns the process, its address and its first screen."""
    command = [sys.executable, "-m", "safe_decode", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    file = folder / f"screen-{time.monotonic_ns()}"
    with file.open("w") as screen:
        process = subprocess.Popen(command, stderr=screen, env=environment, cwd=ROOT)
    deadline = time.monotonic() + 300
    while "╰" not in file.read_text():
        assert process.poll() is None and time.monotonic() < deadline, file.read_text()
        time.sleep(0.1)
    found = re.search(r"http://\S+:\d+", file.read_text())
    assert found
    return process, found.group(0), file.read_text()


def streams_of(address, n):
    answers = []

    def one():
        url = f"{address}/v1/chat/completions"
        # A server that is killed breaks its streams; what its log says is what is tested.
        with (
            contextlib.suppress(httpx2.HTTPError),
            httpx2.stream("POST", url, json=BODY, timeout=120) as response,
        ):
            answers.append("".join(response.iter_text()))

    threads = [threading.Thread(target=one) for _ in range(n)]
    for thread in threads:
        thread.start()
    return threads, answers


def test_sigterm_ends_streams_properly(tmp_path, stage):
    audit = tmp_path / "audit.jsonl"
    process, address, _ = started(tmp_path, *stage, "--audit", str(audit))
    threads, answers = streams_of(address, 8)
    while not audit.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert process.wait(60) == 0
    told = [answer for answer in answers if "data: " in answer]
    assert told and all(answer.rstrip().endswith("data: [DONE]") for answer in told)
    assert all('"finish_reason":"stop"' in answer or '"length"' in answer for answer in told)


def test_without_arguments_one_screen_says_what_is_guarded_and_the_embedded_pair_answers(tmp_path):
    process, address, screen = started(tmp_path)
    for word in ("certificate", "responses alarm", "refused", "hold-back", "exposed"):
        assert word in screen
    name = httpx2.get(f"{address}/v1/models").json()["data"][0]["id"]
    body = {**BODY, "model": name, "stream": False}
    answer = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=120).json()
    process.terminate()
    assert process.wait(60) == 0
    choice = answer["choices"][0]
    assert choice["message"]["content"] or choice["message"]["refusal"]
    assert choice["safety"]["certificate"]["status"] == "valid"


def test_after_kill_9_the_audit_log_goes_on_whole(tmp_path, stage):
    audit = tmp_path / "audit.jsonl"
    process, address, _ = started(tmp_path, *stage, "--audit", str(audit))
    threads, _ = streams_of(address, 4)
    while not audit.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait(60)
    for thread in threads:
        thread.join(60)
    before = len(audit.read_text().splitlines())
    process, address, _ = started(tmp_path, *stage, "--audit", str(audit))
    body = {**BODY, "stream": False}
    answer = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=120).json()
    assert answer["choices"][0]["message"]["content"] == CALM_TEXT
    process.terminate()
    assert process.wait(60) == 0
    lines = audit.read_text().splitlines()
    assert len(lines) == before + 1
    assert json.loads(lines[-1])["action"] == "released"


def test_the_openapi_document_is_kept_under_fuzzing():
    """Schemathesis, with as many cases as SAFE_DECODE_FUZZ says: no 5xx, no traceback."""
    pytest.importorskip("schemathesis")
    cases = os.environ.get("SAFE_DECODE_FUZZ", "60")
    with running(staged_engine(), settings_of(max_new_tokens=2)) as (address, _):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"),
                *("--checks", "not_a_server_error", "--max-examples", cases, "--seed", "1"),
                *("--phases", "examples,coverage,fuzzing", "--no-color"),
            ],
            capture_output=True,
            text=True,
            timeout=3000,
            cwd=ROOT,
        )
        metrics = httpx2.get(f"{address}/metrics").text
    assert done.returncode == 0, done.stdout[-3000:]
    assert 'status="500"' not in metrics
