"""The machine's card that stands beside every figure, and how results are written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "card", "write_results"]

RESULTS = Path(__file__).resolve().parent / "results"


def card(**facts: object) -> dict[str, object]:
    """Describe machine, versions and commit, and add the study's own facts."""
    import torch
    import transformers

    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        **facts,
    }


def write_results(name: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
    """Write `results/NAME.jsonl` whole: the rows, then the card."""
    target = RESULTS / f"{name}.jsonl"
    part = target.with_suffix(".part")
    lines = [*map(json.dumps, rows), json.dumps({"card": facts})]
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(target)
    return target


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
