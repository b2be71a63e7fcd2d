"""Columns that rows of our own form have beside the fields of a conversation.

A file is not refused for saying more than is asked of it: `source` becomes `meta["source"]`,
where evaluation looks for it, and every other column stands under `meta["columns"]`.

Knows names of fields and of columns. Does not know files, other sets or what a field means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from probes.data.conversations import Conversation

__all__ = ["FIELDS", "further_columns", "native_record"]

FIELDS = frozenset({field.name for field in fields(Conversation)} | {"prompt"})
"""What a row may hold; `prompt` stands in place of `messages`."""


def further_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that are no field of a conversation and hold a value."""
    return {
        name: value
        for name, value in row.items()
        if name not in FIELDS and value is not None and value != ""
    }


def native_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's fields, its further columns put aside into `meta`.

    What `meta` says already stands; a `meta` that is no object is left for its own error.
    """
    record = {name: value for name, value in row.items() if name in FIELDS}
    further, meta = further_columns(row), row.get("meta")
    if not further or not (meta is None or isinstance(meta, Mapping)):
        return record
    rest = {name: _as_json(value) for name, value in further.items()}
    kept: dict[str, Any] = {**(meta or {})}
    if "source" in rest and "source" not in kept:
        kept["source"] = rest.pop("source")
    if rest:
        own = kept.get("columns")
        kept["columns"] = {**rest, **(own if isinstance(own, Mapping) else {})}
    return {**record, "meta": kept}


def _as_json(value: object) -> object:
    """Keep what JSON holds; dates, bytes and the like of Parquet become text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
