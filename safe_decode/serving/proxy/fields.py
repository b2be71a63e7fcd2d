"""What an upstream's JSON may hold, value by value: types, bounds and known words.

Knows the values that answers are made of. Does not know where they stand, streams or HTTP.
Everything the reader gets is built anew from what these functions return; what is of another
type or beyond its bound raises ValueError, and what nobody asks for is not passed on.
"""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = [
    "STANDING",
    "TURNED",
    "count_of",
    "ids_of",
    "list_of",
    "number_of",
    "object_of",
    "parsed",
    "safety_of",
    "text_of",
    "word_of",
]

TURNED = ("rewound", "refused", "stopped", "closed")
"""Actions of a response that was turned; what waits of it when it turns is dropped."""

STANDING = ("released", "cut")
"""Actions of a response that stands. `flagged` is neither: nothing protected it."""

_MAX_IDS = 65_536
_MAX_ID = 2**31
_MAX_COUNT = 2**31
_CHARS_PER_ID = 1024
"""More than any token of a known vocabulary has, with room for a stop string that was held."""
_CHANGEABLE = (
    *("max_tokens", "max_completion_tokens", "max_output_tokens"),
    *("temperature", "top_p", "top_k", "min_p"),
)
"""Fields of a request of which an upstream may say that it served another value."""
_WORDS = {"population": 64, "why": 200}


def parsed(data: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: It is not UTF-8, not JSON, nested too deeply, or no object.
    """
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    return object_of(body)


def object_of(value: object) -> dict[str, Any]:
    """Return an object; None: an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} stands where an object belongs")
    return value


def list_of(value: object, *, most: int) -> list[Any]:
    """Return a list; None: an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"wanted a list of at most {most}")
    return value


def text_of(value: object, *, n_ids: int | None = None) -> str:
    """Return a text; None: no text.

    Args:
        value: Of the upstream.
        n_ids: Ids it came with, by which its length is bounded; None: no bound of its own.

    Raises:
        ValueError: It is no string, half a character, without ids or too long for them.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError("a text is no string")
    value.encode("utf-8")  # half of a surrogate pair cannot be sent on
    if n_ids is not None and len(value) > n_ids * _CHARS_PER_ID:
        raise ValueError(f"a text of {len(value)} characters came with {n_ids} ids")
    return value


def word_of(value: object, known: tuple[str, ...]) -> str:
    """Return one of the known words."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"an unknown word, wanted one of {known}")
    return value


def count_of(value: object) -> int:
    """Return a count."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_COUNT:
        raise ValueError("a count is no number of things")
    return value


def ids_of(value: object) -> tuple[int, ...]:
    """Return token ids."""
    ids = list_of(value, most=_MAX_IDS)
    if not all(type(i) is int and 0 <= i < _MAX_ID for i in ids):
        raise ValueError("token_ids holds something else than ids")
    return tuple(ids)


def safety_of(value: object, bundle: str) -> dict[str, Any]:
    """Return the safety object of a response that has ended.

    Of an exposing upstream it also has statistics, thresholds and what was taken back. These
    are of its operator's choice and stay behind, as do the texts of tokens.

    Args:
        value: What the upstream said.
        bundle: The mark of the guard that is expected.

    Raises:
        ValueError: It lacks the mark, or says that nothing protected the response.
    """
    told = object_of(value)
    certificate = object_of(told.get("certificate"))
    if certificate.get("bundle") != bundle:
        raise ValueError("a response ends without the mark of its guard")
    if told.get("unprotected"):
        raise ValueError("a response was not protected")
    rebuilt: dict[str, Any] = {"status": word_of(certificate.get("status"), ("valid", "void"))}
    for name in ("alpha", "confidence", "responses"):
        if name in certificate:
            rebuilt[name] = _number(certificate[name])
    for name, most in _WORDS.items():
        text = text_of(certificate.get(name))
        if text:
            rebuilt[name] = "".join(c if c.isprintable() else " " for c in text[:most])
    safety = {
        "action": word_of(told.get("action"), (*TURNED, *STANDING)),
        "certificate": {**rebuilt, "bundle": bundle},
    }
    changed = [_change_of(one) for one in list_of(told.get("changed"), most=len(_CHANGEABLE))]
    return {**safety, "changed": changed} if changed else safety


def _change_of(value: object) -> dict[str, Any]:
    """Return one thing in which a response is another than was asked for; its words stay behind."""
    told = object_of(value)
    asked = told.get("asked")
    return {
        "param": word_of(told.get("param"), _CHANGEABLE),
        # A client may ask for more tokens than there are numbers here.
        "asked": _number(min(asked, _MAX_COUNT) if isinstance(asked, int) else asked),
        "served": _number(told.get("served")),
    }


def number_of(value: object) -> int | float | None:
    """Return a finite number, or None."""
    return None if value is None else _number(value)


def _number(value: object) -> int | float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("a number is none")
    if abs(value) > _MAX_COUNT or not math.isfinite(value):  # in this order: integers overflow
        raise ValueError("a number is not finite, or too large")
    return value


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")
