"""The proxy as a process in front of the server as a process. Slow: each starts both."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from tests.proxying import chunks_in, shown_in
from tests.servers import MODEL
from tests.staged import ATTACK, CALM, CALM_TEXT, KEPT, staged, write

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CLIENT = {"authorization": "Bearer of-a-client"}
BODY = {"model": MODEL, "messages": CALM}


def started(folder, command, *arguments, **environment):
    """Start a command; returns the process, its address and its first screen."""
    line = [sys.executable, "-m", "safe_decode", command, "--port", "0", *arguments]
    own = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), **environment}
    file = folder / f"{command}-{time.monotonic_ns()}"
    with file.open("w") as screen:
        process = subprocess.Popen(line, stderr=screen, env=own, cwd=ROOT)
    deadline = time.monotonic() + 300
    while "╰" not in file.read_text():
        assert process.poll() is None and time.monotonic() < deadline, file.read_text()
        time.sleep(0.1)
    found = re.search(r"http://\S+:\d+", file.read_text().splitlines()[0])
    assert found
    return process, found.group(0), file.read_text()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A server and a proxy in front of it; yields the server's process and both addresses."""
    folder = tmp_path_factory.mktemp("pair")
    write(folder)
    server, upstream, _ = started(
        folder,
        "serve",
        *("--model", str(folder / "model"), "--bundle", str(folder / "bundle")),
        *("--set", f"served_name={MODEL}", "--api-key", "of-the-operator"),
    )
    proxy, address, screen = started(
        folder,
        "proxy",
        *("--upstream", upstream, "--bundle", staged().bundle.digest, "--api-key", "of-a-client"),
        *("--holdback-tokens", "2", "--set", "canary_every_s=0"),
        SAFE_DECODE_PROXY_UPSTREAM_KEY="of-the-operator",
        SAFE_DECODE_PROXY_OPERATOR_KEYS="of-operations",
    )
    assert upstream in screen and "environment: operator_keys, upstream_key" in screen
    assert "of-the-operator" not in screen and "of-a-client" not in screen
    yield server, proxy, address
    for process in (proxy, server):
        process.kill()
        process.wait(60)


def asked(address, body, headers=CLIENT):
    url = f"{address}/v1/chat/completions"
    return httpx2.post(url, json=body, headers=headers, timeout=120)


def test_the_pair_answers_streams_trips_refuses_and_outlives_its_upstream(pair):
    server, proxy, address = pair
    whole = asked(address, BODY).json()["choices"][0]
    assert whole["message"]["content"] == CALM_TEXT
    assert whole["safety"]["certificate"]["bundle"] == staged().bundle.digest[:16]
    chunks = chunks_in(asked(address, {**BODY, "stream": True}))
    assert shown_in(chunks) == CALM_TEXT
    tripped = chunks_in(asked(address, {**BODY, "messages": ATTACK, "stream": True}))
    shown = shown_in(tripped)
    assert shown.startswith(KEPT[:-2]) and not shown.startswith(KEPT)
    assert shown_in(tripped, "refusal") and not any(letter in shown for letter in "bcdefgh")
    assert tripped[-1]["choices"][0]["finish_reason"] == "content_filter"
    for headers in ({}, {"authorization": "Bearer of-the-operator"}):
        assert asked(address, BODY, headers).status_code == 401
    assert httpx2.get(f"{address}/healthz").status_code == 200
    assert httpx2.get(f"{address}/readyz").status_code == 200
    assert httpx2.get(f"{address}/metrics").status_code == 401
    operator = {"authorization": "Bearer of-operations"}
    assert "safe_decode_trips_total" in httpx2.get(f"{address}/metrics", headers=operator).text

    # The upstream is killed in mid-stream.
    body = {**BODY, "stream": True, "n": 8}
    url = f"{address}/v1/chat/completions"
    with httpx2.stream("POST", url, json=body, headers=CLIENT, timeout=60) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line)
        server.send_signal(signal.SIGKILL)
        told = [first, *(line for line in lines if line)]
    assert told[-1] == "data: [DONE]"
    choices = [json.loads(line[6:])["choices"][0] for line in told[:-1]]
    ends = {choice["index"]: choice for choice in choices if choice["finish_reason"]}
    assert sorted(ends) == list(range(8))
    assert any(end["safety"]["action"] == "closed" for end in ends.values())
    assert httpx2.get(f"{address}/readyz").status_code == 503
    assert asked(address, BODY).status_code == 503
    proxy.send_signal(signal.SIGTERM)
    assert proxy.wait(60) == 0
