"""Rows of a long run, on disk as they are measured, so that a run that was ended goes on.

One JSON object a line: first `{"card": {...}}` with what the run is of, then the rows, each
with its `key`. Every write goes to a temporary name and is renamed, so that a reader never
sees half a row.

Knows lines, keys and identities. Does not know what a row means.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safe_decode.errors import ConfigurationError, DataError
from safe_decode.whole_files import write_whole

__all__ = ["Journal", "read_journal"]


class Journal:
    """The rows of one run.

    Args:
        path: Where they are written.
        identity: What must be the same for rows to belong together: model, seeds, sizes.
        facts: Said on the card beside the identity, such as the machine; may differ.
        other: What to do with rows of another identity: `refuse`, or `replace` them.

    Raises:
        ConfigurationError: `path` holds a run of another identity, and `other` is refuse.
        DataError: `path` cannot be read as a journal.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, Any],
        *,
        facts: Mapping[str, Any] | None = None,
        other: Literal["refuse", "replace"] = "refuse",
    ) -> None:
        self.path = Path(path)
        # As it will be read back: tuples become lists.
        known = json.loads(json.dumps(identity))
        self._card = {**(facts or {}), "identity": known}
        self.rows: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return
        card, rows = read_journal(self.path)
        if card.get("identity") == known:
            self.rows = {row["key"]: row for row in rows}
        elif other == "refuse":
            raise ConfigurationError(
                f"{self.path} holds a run of {card.get('identity')}, this one is of {known}; pass "
                "another file, or delete it."
            )

    def __contains__(self, key: str) -> bool:
        """Say whether a row of this key is there."""
        return key in self.rows

    def add(self, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a row, and write all of them."""
        kept = {"key": key, **row}
        self.rows[key] = kept
        lines = [{"card": self._card}, *self.rows.values()]
        try:
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise ConfigurationError(
                f"{self.path} cannot be written: {error.strerror}; pass a file in a directory that "
                "exists."
            ) from error
        return kept


def read_journal(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the card and the rows of a journal.

    Raises:
        DataError: The file cannot be read, or a line is no row of a journal.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{os.fspath(path)} cannot be read as a journal: {error}.") from error
    cards = [r["card"] for r in records if isinstance(r, dict) and "card" in r]
    rows = [r for r in records if isinstance(r, dict) and "key" in r]
    if len(cards) != 1 or len(rows) + 1 != len(records):
        raise DataError(
            f"{os.fspath(path)} has {len(cards)} cards and {len(rows)} rows in {len(records)} "
            "lines, wanted one card and rows with a key; delete it."
        )
    return cards[0], rows
