"""JSON lines of traces: one flat object a line, every value of a known type.

Knows JSON, kinds of lines and the types of their values. Does not know what a trace means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from safe_decode.decision import Action, Outcome, Reason, Redirect
from safe_decode.errors import DataError

__all__ = ["checked", "line", "parsed", "plain"]

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def plain(value: object) -> object:
    """Write a value as JSON has it."""
    # JSON has no NaN; what failed must still be readable by other languages.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def line(kind: str, record: Mapping[str, Any]) -> str:
    """Write a line."""
    return json.dumps({"kind": kind, **record}, allow_nan=False, separators=(",", ":"))


def parsed(text: str, number: int) -> tuple[str, dict[str, Any]]:
    """Read a line.

    Raises:
        DataError: It is no line of a trace.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"line {number} is not JSON: {error}; the file is cut or foreign."
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise DataError(f"line {number} is no trace line: wanted a JSON object with a kind.")
    return record["kind"], record


_WORDS: Mapping[str, Sequence[str]] = {
    "Redirect": get_args(Redirect),
    "Action": get_args(Action),
    "Reason": get_args(Reason),
    "Outcome": get_args(Outcome),
}


def checked(name: str, kind: str, value: object, number: int) -> object:
    """Read a value.

    Args:
        name: Of the field.
        kind: Its type, as the field's annotation has it.
        value: From JSON.
        number: Of the line, for errors.

    Raises:
        DataError: It is of another type, or no known word.
    """
    if kind in _WORDS:
        if value not in _WORDS[kind]:
            raise DataError(
                f"line {number} has {name}={value!r}, wanted one of {', '.join(_WORDS[kind])}; "
                "upgrade safe-decode if a newer one wrote it."
            )
        return value
    kind, optional = kind.removesuffix(" | None"), kind.endswith(" | None")
    if value is None and optional:
        return None
    if kind.startswith("tuple") and isinstance(value, list):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(checked(name, inner, item, number) for item in value)
    if kind == "float" and not isinstance(value, bool):
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
    if {"int": int, "str": str, "bool": bool}.get(kind) is type(value):
        return value
    raise DataError(f"line {number} has {name}={value!r}, wanted {kind}; the file is foreign.")
