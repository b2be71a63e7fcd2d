"""What no client should send: schemathesis on the OpenAPI document, and hostile bodies."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.serving.client import MODEL
from benchmarks.serving.process import Served, serving

__all__ = ["fuzz", "hostile"]

_ROOT = Path(__file__).resolve().parents[2]
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages")
_CASES_A_ROUND = 1_200
"""Cases that schemathesis makes of the document at 80 examples an operation, at least."""


def fuzz(scale: float) -> dict[str, Any]:
    """Schemathesis, at least 5,000 cases, seed by seed: no 5xx, no traceback."""
    wanted = max(500, round(5_000 * scale))
    examples = max(20, round(80 * min(1.0, wanted / _CASES_A_ROUND)))
    cases, seed, told = 0, 0, ""
    with serving("--set", "max_new_tokens=2") as served:
        while cases < wanted and not told:
            seed += 1
            found, told = _schemathesis(served, examples, seed)
            cases += found
        status_500 = _server_errors(served)
        ready = httpx2.get(f"{served.address}/readyz").status_code == 200
    bad = [told] if told else []
    bad += ["5xx"] if status_500 else []
    bad += [] if ready else ["not ready afterwards"]
    return {
        "cases": cases,
        "seeds": seed,
        "answers_5xx": status_500,
        "missed": ", ".join(bad),
    }


def _schemathesis(served: Served, examples: int, seed: int) -> tuple[int, str]:
    """Run it once; return its cases, and what it found or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli"),
                *("run", f"{served.address}/openapi.json"),
                *("--checks", "not_a_server_error,no_traceback"),
                *("--max-examples", str(examples), "--seed", str(seed)),
                *("--phases", "examples,coverage,fuzzing", "--no-color"),
            ],
            capture_output=True,
            text=True,
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(_ROOT),
                "SCHEMATHESIS_HOOKS": "benchmarks.serving.fuzz_checks",
            },
            check=False,
        )
    found = re.search(r"(\d+) generated", done.stdout)
    if found is None:
        raise RuntimeError(
            f"schemathesis said nothing of its cases, it ended with {done.returncode}: "
            f"{(done.stdout + done.stderr)[-2000:]}; install it with pip install '.[fuzz]'."
        )
    return int(found.group(1)), "" if done.returncode == 0 else done.stdout[-3000:]


def hostile(scale: float) -> dict[str, Any]:
    """Bodies that are huge, deep, split, of wrong types or not finite: 4xx and no traceback."""
    rounds = max(1, round(20 * scale))
    statuses: Counter[str] = Counter()
    leaked = 0
    with serving("--set", "max_new_tokens=2") as served, httpx2.Client(timeout=120) as client:
        for number in range(rounds):
            for path in _PATHS:
                for body in _bodies(random.Random(number)):
                    url = served.address + path
                    headers = {"content-type": "application/json"}
                    answer = client.post(url, content=body, headers=headers)
                    statuses[f"{answer.status_code // 100}xx"] += 1
                    leaked += "Traceback" in answer.text or 'File "' in answer.text
        ready = httpx2.get(f"{served.address}/readyz").status_code == 200
    bad = [name for name in ("5xx",) if statuses[name]]
    bad += ["traceback"] if leaked else []
    bad += [] if ready else ["not ready afterwards"]
    return {
        "bodies": sum(statuses.values()),
        **{f"answers_{name}": statuses[name] for name in ("2xx", "4xx", "5xx")},
        "tracebacks": leaked,
        "missed": ", ".join(bad),
    }


_FIELDS = ("temperature", "top_p", "seed", "n", "max_tokens", "stop", "stream", "logit_bias")
_VALUES = (
    *("NaN", "Infinity", "-1e999", "1e400", "9" * 400),
    *("[]", "{}", '"x"', "null", "true"),
)
_MESSAGES = (
    *("NaN", "[]", "{}", "[null]"),
    *('[{"role": "user"}]', '[{"role": [], "content": {}}]'),
)
_PROMPTS = ("[]", "[[]]", "[-1]", "[1e9]", "[99999999999]", "[[1],[true]]", '["a", 1]', "NaN")


def _bodies(rng: random.Random) -> Iterator[bytes]:
    """Yield hostile bodies; what is random in them follows `rng`."""
    good: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 2,
        "messages": [{"role": "user", "content": "a"}],
    }
    whole = json.dumps(good).encode()
    yield b""
    yield whole[: rng.randrange(len(whole))]
    yield bytes(rng.randrange(256) for _ in range(rng.randrange(1, 400)))
    yield b"[" * rng.randrange(1_000, 200_000)
    yield b'{"a":' * rng.randrange(1_000, 100_000)
    yield b'{"model": "' + b"x" * rng.randrange(900_000, 1_100_000) + b'"}'
    text = "ä€😀".encode()
    cut = text[: rng.randrange(1, len(text))]
    yield whole.replace(b'"a"', b'"' + cut + b'"')
    yield whole.replace(b'"a"', b'"\\ud83d"')
    yield whole.replace(b'"a"', b'"\\u0000\\uffff"')
    yield whole.replace(b'"a"', b'"' + b"a " * rng.randrange(2_000, 400_000) + b'"')
    for field in _FIELDS:
        for value in _VALUES:
            yield json.dumps({**good, field: "@"}).replace('"@"', value).encode()
    for messages in _MESSAGES:
        yield json.dumps({**good, "messages": "@"}).replace('"@"', messages).encode()
    for prompt in _PROMPTS:
        yield json.dumps({"model": MODEL, "prompt": "@"}).replace('"@"', prompt).encode()


def _server_errors(served: Served) -> int:
    """Count the answers of status 5xx, by the server's own metrics."""
    text = httpx2.get(f"{served.address}/metrics").text
    found = re.findall(r'safe_decode_requests_total\{.*status="5\d\d"\} (\S+)', text)
    return int(sum(map(float, found)))
