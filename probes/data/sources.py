"""Which set a row comes from. Knows what rows record. Does not know files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probes.data.conversations import Conversation

__all__ = ["source_name", "source_of"]


def source_of(row: Conversation) -> str:
    """Name where a row comes from: a data set, else a situation, else `all`.

    Figures within a source do not reward a monitor for telling sources apart.
    """
    return source_name(row.meta)


def source_name(meta: Mapping[str, Any]) -> str:
    """Do the same for what is known of a row or a request."""
    return str(meta.get("source") or meta.get("situation") or "all")
