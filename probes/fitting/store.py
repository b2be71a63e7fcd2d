"""Where activations are while probes are fitted. Knows places. Does not know what is kept there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safe_decode.errors import ConfigurationError

__all__ = ["FeatureStore"]

_IN_MEMORY = 1 << 30
"""Bytes of activations."""


@dataclass(frozen=True, slots=True)
class FeatureStore:
    """Where activations are while probes are fitted.

    Attributes:
        directory: Memory-mapped shards are kept and reused there; None: in memory, or where that
            would be much, in a temporary directory.
        recompute: Nothing is kept: every pass runs the model again. Slow, and small.
    """

    directory: Path | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.recompute and self.directory is not None:
            raise ConfigurationError(
                f"directory={self.directory} and recompute exclude each other; pass one of them."
            )

    @contextmanager
    def place(self, n_bytes: int) -> Iterator[Path | None]:
        """Yield the directory that so many bytes of activations are kept in; None: in memory."""
        if self.directory is not None or n_bytes <= _IN_MEMORY:
            yield self.directory
            return
        with tempfile.TemporaryDirectory(prefix="safe-decode-activations-") as scratch:
            yield Path(scratch)
