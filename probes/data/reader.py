"""Conversations and requests from any source, bad rows counted and named.

Knows how columns become conversations and how bad rows are reported. Formats are known to
`formats`, the meaning of columns to `schemas`, validity to `conversations`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from probes.data.conversations import Conversation, conversation_from
from probes.data.formats import SourceRow, read_rows
from probes.data.further_columns import further_columns
from probes.data.schemas import ColumnMap, Record, column_map, map_for
from safe_decode.errors import DataError
from safe_decode.typing import Json

__all__ = ["Reading", "read_conversations"]

_NAMED = 10
_EMPTY = {"", "null", "none", "nan"}
_TEXT_FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
_FLAG_FIELDS = ("response_harmful", "prompt_harmful", "refusal", "ended")
_NUMBER_FIELDS = ("onset_char", "prefill_tokens")
_JSON_FIELDS = ("messages", "meta", "response_ids", "generation")


@dataclass
class Reading:
    """What came out of a source.

    Attributes:
        source: What was read.
        columns: The column map that was used; several where rows differ.
        conversations: Rows with a response, in the order of the source.
        prompts: Rows without one, as conversations with an empty response.
        rows: How many rows there were.
        bad: How many could not be used.
        named: The first ten of these, `file:line: reason`.
        set_aside: Columns that mean nothing here, and in how many rows; they stand in `meta`.
    """

    source: str
    columns: Counter[str] = field(default_factory=Counter)
    conversations: list[Conversation] = field(default_factory=list)
    prompts: list[Conversation] = field(default_factory=list)
    rows: int = 0
    bad: int = 0
    named: list[str] = field(default_factory=list)
    set_aside: Counter[str] = field(default_factory=Counter)

    @property
    def note(self) -> str | None:
        """Say for people which columns were put aside, and how to name them; None: none was."""
        if not self.set_aside:
            return None
        told = ", ".join(f"{name} ({n:,} rows)" for name, n in sorted(self.set_aside.items()))
        return (
            f"columns put aside into meta: {told}; if one of them is a field of ours, name it with "
            "--columns, for example --columns prompt=question,response=answer"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the counts, for reports and provenance."""
        return {
            "source": self.source,
            "columns": dict(self.columns),
            "rows": self.rows,
            "conversations": len(self.conversations),
            "prompts": len(self.prompts),
            "bad": self.bad,
            "first_bad": list(self.named),
            "set_aside": dict(sorted(self.set_aside.items())),
        }


def read_conversations(
    source: str | os.PathLike[str], *, columns: str = "auto", strict: bool = False
) -> Reading:
    """Read a source.

    Args:
        source: See `formats.read_rows`.
        columns: `auto` recognises the set by its columns; see `schemas.column_map`.
        strict: Stop at the first bad row.

    Raises:
        DataError: The source cannot be read, holds no usable row, or, if strict, a bad one.
        ConfigurationError: `columns` names nothing known.
    """
    wanted = column_map(columns)
    reading = Reading(os.fspath(source))
    for row in read_rows(source):
        reading.rows += 1
        try:
            for conversation in _conversations(row, wanted, reading):
                kept = reading.conversations if conversation.response else reading.prompts
                kept.append(conversation)
        except DataError as error:
            message = f"{row.place}: {error}"
            if strict:
                raise DataError(message) from error
            reading.bad += 1
            if len(reading.named) < _NAMED:
                reading.named.append(message)
    if not reading.conversations and not reading.prompts:
        first = f"; the first of {reading.bad} bad rows: {reading.named[0]}" if reading.bad else ""
        raise DataError(f"{reading.source} holds no usable row{first}. Pass another source.")
    return reading


def _conversations(
    row: SourceRow, wanted: ColumnMap | None, reading: Reading
) -> Iterator[Conversation]:
    """Turn one row into conversations: all of them, or an error and none."""
    if row.values is None:
        raise DataError(row.error or "the row cannot be parsed")
    values = _present(row)
    chosen = wanted or map_for(values)
    if missing := sorted(chosen.needs - set(values)):
        raise DataError(f"the row lacks the columns {missing} of {chosen.name!r}.")
    try:
        records = chosen.records(values)
        found = [_conversation(record) for record in records]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the row does not fit the columns of {chosen.name!r}: {type(error).__name__} {error}."
        ) from error
    reading.columns[chosen.name] += 1
    if chosen.keeps_further:
        reading.set_aside.update(further_columns(values).keys())
    yield from found


def _conversation(record: Record) -> Conversation:
    record = {name: value for name, value in record.items() if value is not None}
    record.setdefault("response", "")
    return conversation_from(record)


def _present(row: SourceRow) -> Mapping[str, Any]:
    """Give the text of CSV the types that JSON would have."""
    values = dict(row.values or {})
    if not row.is_text:
        return values
    for name, value in values.items():
        word = value.strip().casefold()
        if name in _FLAG_FIELDS:
            values[name] = None if word in _EMPTY else _TEXT_FLAGS.get(word, value)
        elif name in _NUMBER_FIELDS:
            values[name] = None if word in _EMPTY else _whole(value)
        elif name in _JSON_FIELDS:
            values[name] = None if word in _EMPTY else _parsed(name, value)
        elif name in ("category", "group", "split") and word in _EMPTY:
            values[name] = None
    return values


def _whole(value: str) -> int | str:
    return int(value) if value.strip().lstrip("-").isdigit() else value


def _parsed(name: str, value: str) -> Json:
    try:
        found: Json = json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is not JSON: {error}.") from error
    return found
