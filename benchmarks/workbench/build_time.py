"""One command from a model to a bundle: time, memory, and kills.

Run: `python -m benchmarks.workbench.build_time --model M --data-dir D [--recipe files]`.

The build runs once undisturbed; its minutes and peak memory are those of the process. Then it runs
again in another place and is ended by kill -9 in each step, and goes on; its bundle must have the
same digest. Model and data are not part of the project.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.card import aligned, card, write_results

LOG = logging.getLogger("benchmarks.workbench.build_time")
STEPS = ("answers", "locate", "fit and certify", "evaluate")
_INTO_S = 2.0
"""Seconds into a step before it is killed."""
_GIB = 2**20  # kilobytes
_TARGET_MINUTES, _TARGET_GIB = 30, 6


def build(arguments: Sequence[str], out: Path, kill_in: str | None) -> tuple[float, int, int]:
    """Run a build; kill it in a step if one is named.

    Returns:
        Seconds, peak resident kilobytes, exit status.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "safe_decode", "build", *arguments, "--out", str(out), "--json"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        LOG.info("%s", line.rstrip())
        if kill_in is not None and line.strip() == f"step: {kill_in}":
            threading.Timer(_INTO_S, process.send_signal, (signal.SIGKILL,)).start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return time.perf_counter() - begun, usage.ru_maxrss, process.returncode


def digest_of(out: Path) -> str:
    """Return the digest of the bundle that was written."""
    return str(json.loads((out / "card.json").read_text(encoding="utf-8"))["digest"])


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Build undisturbed and with kills, write `results/build_time.jsonl`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workbench.build_time")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--recipe", default="files")
    parser.add_argument("--work", type=Path, default=None, help="place for the bundles")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = ["--model", given.model, "--data-dir", given.data_dir, "--recipe", given.recipe]
    root = given.work or Path(tempfile.mkdtemp(prefix="build-time-"))
    root.mkdir(parents=True, exist_ok=True)
    seconds, peak, status = build(arguments, root / "plain", None)
    if status:
        raise SystemExit(f"the undisturbed build ended with status {status}")
    worth = json.loads((root / "plain" / "report.json").read_text(encoding="utf-8"))["worth"]
    digest = digest_of(root / "plain")
    rows: list[dict[str, Any]] = [
        {
            "run": "undisturbed",
            "minutes": round(seconds / 60, 1),
            "peak GiB": round(peak / _GIB, 2),
            "bundle": digest[:12],
            "recall": f"{worth['recall']['hits']} of {worth['recall']['n']}",
            "false alarms": f"{worth['false_alarms']['hits']} of {worth['false_alarms']['n']}",
            "target": f"< {_TARGET_MINUTES} min, < {_TARGET_GIB} GiB",
            "met": "yes" if seconds < 60 * _TARGET_MINUTES and peak < _GIB * _TARGET_GIB else "no",
        }
    ]
    total = 0.0
    for step in (*STEPS, None):
        spent, peak, status = build(arguments, root / "killed", step)
        total += spent
        rows.append(
            {
                "run": "then to its end" if step is None else f"killed in: {step}",
                "minutes": round(spent / 60, 1),
                "peak GiB": round(peak / _GIB, 2),
                "status": status,
            }
        )
    same = digest_of(root / "killed") == digest
    rows[-1] |= {
        "bundle": digest_of(root / "killed")[:12],
        "target": "the same bundle",
        "met": "yes" if same else "no",
    }
    write_results(
        "build_time", aligned(rows), card(model=Path(given.model).name, recipe=given.recipe)
    )
    return rows


if __name__ == "__main__":
    main()
