"""One line of JSON a response, for those who answer for the service.

Knows what is written and what never is: no text, no ids and no keys, unless text was asked
for. Does not know HTTP. A line is written at once and whole, by one call, so that a process
that is killed leaves at most one broken line at the end, which the next start closes.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safe_decode.errors import ConfigurationError

__all__ = ["AuditLog"]


class AuditLog:
    """Appends to one file.

    Args:
        path: Where; None: nothing is written.

    Raises:
        ConfigurationError: It cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._lock, self._file = threading.Lock(), -1
        if path is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            self._close_broken_line()
        except OSError as error:
            raise ConfigurationError(
                f"audit={path} cannot be written: {error.strerror}; pass a file in a directory "
                "that exists."
            ) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        with self._lock:
            if self._file >= 0:
                os.write(self._file, (line + "\n").encode())

    def close(self) -> None:
        """Close the file; writing afterwards does nothing."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _close_broken_line(self) -> None:
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")
