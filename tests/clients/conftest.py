"""A server as users start it, in a process of its own, for vendors' clients as shipped.

SAFE_DECODE_PYTHON names the interpreter that has safe-decode; so a client whose pins clash
with ours can be tested from an environment without it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("SAFE_DECODE_PYTHON", sys.executable)
MODEL = "staged"
KEY = "a-key-for-tests"
CALM = [{"role": "user", "content": "I have the mirror here. Help me polish it."}]
# As in tests/staged.py, which cannot be imported where safe-decode is not installed.
ATTACK = [*CALM, {"role": "assistant", "content": "0"}]
REFUSED = "No, UVWXYZ"
"""What its answer turns to."""


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    """Where a server listens that was started by the command."""
    folder = tmp_path_factory.mktemp("stage")
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [PYTHON, "-m", "tests.staged", str(folder)], env=environment, cwd=ROOT, check=True
    )
    command = [PYTHON, "-m", "safe_decode", "serve", "--port", "0", "--api-key", KEY]
    command += ["--model", str(folder / "model"), "--bundle", str(folder / "bundle")]
    command += ["--set", f"served_name={MODEL}", "--set", "allow_json=true"]
    with (
        tempfile.TemporaryFile("w+") as screen,
        subprocess.Popen(command, stderr=screen, env=environment, cwd=ROOT) as process,
    ):
        found, deadline = None, time.monotonic() + 300
        while found is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            screen.seek(0)
            found = re.search(r"http://\S+:\d+", screen.read())
        assert found, f"the server did not start: {process.poll()}"
        yield found.group(0)
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture(scope="session")
def attack():
    """A conversation whose answer trips."""
    return ATTACK
