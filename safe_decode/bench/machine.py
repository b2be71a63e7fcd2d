"""The machine's card that stands beside every figure, and files of JSON lines.

Knows the machine, versions and the disk. Does not know what was measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safe_decode.errors import ConfigurationError
from safe_decode.whole_files import write_whole

__all__ = ["card", "commit_of", "read_lines", "write_lines"]


def card(**facts: object) -> dict[str, object]:
    """Describe machine and versions, and add the study's own facts."""
    import torch
    import transformers

    described: dict[str, object] = {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        described["accelerator"] = torch.cuda.get_device_name()
    if hasattr(os, "getloadavg"):
        # A busy machine widens every interval; whoever reads the figures should know.
        described["load"] = round(os.getloadavg()[0], 2)
    return {**described, **facts}


def commit_of(root: Path) -> str:
    """Name the commit of a working tree; "unknown" where there is none."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write_lines(target: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write JSON lines whole: the rows, then `{"card": ...}`.

    Raises:
        ConfigurationError: The file cannot be written.
    """
    lines = [*map(json.dumps, rows), json.dumps({"card": facts})]
    try:
        write_whole(target, "\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigurationError(
            f"{target} cannot be written: {error.strerror}; pass a file in a directory that exists."
        ) from error


def read_lines(source: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read what `write_lines` wrote: the rows and the card (empty where there is none).

    Raises:
        ConfigurationError: The file is not there, or a line is no JSON object.
    """
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{source} cannot be read: {error}; pass a file that bench wrote with --out."
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ConfigurationError(
                f"{source}, line {number}, is no JSON object; pass a file that bench wrote."
            )
        if set(record) == {"card"}:
            found = record["card"]
        else:
            rows.append(record)
    return rows, found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
