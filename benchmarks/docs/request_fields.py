"""The table of request fields: what becomes of each, from the table that the server reads.

Knows rows of the table and of the table of capabilities. Does not know requests.
"""

from __future__ import annotations

from typing import get_args

from benchmarks.docs.markdown import table
from safe_decode.engines.transformers.capability import EFFECTS
from safe_decode.engines.transformers.capability_table import TABLE
from safe_decode.serving.schemas.field_rule import FieldPlace, FieldRule
from safe_decode.serving.schemas.field_table import as_rows

__all__ = ["as_markdown"]

_TITLES: dict[FieldPlace, str] = {
    "chat": "`/v1/chat/completions`",
    "completions": "`/v1/completions`",
    "messages": "`/v1/messages`",
    "responses": "`/v1/responses`",
    "tokens": "`/v1/messages/count_tokens` and `/tokenize`",
    "message": "In a message",
    "part": "In a part of a message",
}


def as_markdown() -> str:
    """Draw a table for each place where fields stand."""
    return "\n\n".join(f"## {_TITLES[place]}\n\n{_table(place)}" for place in get_args(FieldPlace))


def _table(place: FieldPlace) -> str:
    rows = []
    for treatment, rules in as_rows(place).items():
        grouped: dict[tuple[str, str, str], list[str]] = {}
        for rule in rules:
            kind = f"{treatment}, with `strict_parameters` too" if rule.in_strict else treatment
            note = rule.why
            if rule.neutral:
                values = ", ".join(f"`{_written(value)}`" for value in rule.neutral)
                note += f"; accepted where it asks for nothing: {values}"
            grouped.setdefault((kind, _effect(rule), note), []).append(f"`{rule.name}`")
        rows += [[", ".join(names), *key] for key, names in grouped.items()]
    return table(("field", "what becomes of it", "certificate", "note"), rows)


def _effect(rule: FieldRule) -> str:
    return next((EFFECTS[row.effect] for row in TABLE if row.feature == rule.feature), "")


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", '"')
