"""Which fields of a body are let in: each by the table, the rest dropped or refused by name.

Knows the table, bodies as their schemas have read them, and parts of messages. Does not know
models, limits or HTTP. What is ignored is taken out of the body here, so that nothing behind this
door, an upstream least of all, sees a field that nobody decided about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import BaseModel

from safe_decode.serving.schemas.errors import ApiError, unsupported
from safe_decode.serving.schemas.field_rule import FieldPlace, FieldRule
from safe_decode.serving.schemas.field_table import RULES
from safe_decode.serving.schemas.messages import Part, Turn
from safe_decode.serving.schemas.requests import RequestBody
from safe_decode.serving.schemas.responses_request import InputItem, ResponsesRequest

__all__ = ["CHANGED", "IGNORED", "admitted", "shown_names"]

IGNORED = "x-safe-decode-ignored"
"""The header that names what was accepted and ignored."""
CHANGED = "x-safe-decode-changed"
"""The header that names what is served otherwise than was asked, with the value in effect."""

_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_SHOWN = 16

_NOT_READ = {
    "image_url": "a picture",
    "image": "a picture",
    "input_image": "a picture",
    "video_url": "a film",
    "input_audio": "sound",
    "audio": "sound",
    "file": "a file",
    "input_file": "a file",
    "document": "a file",
}
"""Types of parts that hold no text, in words."""
_OWN_THOUGHTS = frozenset({"thinking", "redacted_thinking", "reasoning", "reasoning_text"})
"""Types of parts that a client hands back and no template here would read."""


def admitted(ask: RequestBody, *, is_strict: bool = False) -> tuple[str, ...]:
    """Check every field of a body against the table, and drop what is ignored.

    Args:
        ask: As its schema has read it; fields that the schema lacks are taken out of it.
        is_strict: Refuse what would be ignored, unless the table excepts it.

    Returns:
        Names of what was dropped and held something, each once.

    Raises:
        ApiError: A field or part is refused or unknown; it is named, with the reason.
    """
    dropped = dict.fromkeys(_dropped(ask, ask.place, "", is_strict))
    for name in type(ask).model_fields:
        value = getattr(ask, name)
        if isinstance(value, BaseModel):
            dropped |= dict.fromkeys(_of_options(value, name, is_strict))
    if isinstance(ask, ResponsesRequest) and isinstance(ask.input, list):
        dropped |= dict.fromkeys(_of_items(ask.input, is_strict))
    for at, turn in ask.turns():
        dropped |= dict.fromkeys(_of_turn(turn, at, is_strict))
    return tuple(dropped)


def shown_names(names: tuple[str, ...]) -> str:
    """Write names for a header: those that a header can carry, and how many more there are."""
    plain = [name for name in names if _PLAIN.fullmatch(name)]
    shown = plain[:_MOST_SHOWN]
    left = len(names) - len(shown)
    return ", ".join([*shown, *([f"{left} more"] if left else [])])


def _of_items(items: list[InputItem], is_strict: bool) -> Iterator[str]:
    """Name items that are left out, and refuse those that neither speak nor may be left out."""
    for number, item in enumerate(items):
        at = f"input.{number}"
        if item.type in _OWN_THOUGHTS and not is_strict:
            item.role = None
            yield f"input.{item.type}"
        elif item.type != "message":
            raise unsupported(
                f"{at}.type",
                f"this item is of the type {item.type!r}, and only messages of text are read; "
                "leave it out.",
            )
        elif item.role is None:
            raise ApiError(
                400,
                f"{at} is a message without a role; pass system, developer, user or assistant.",
                param=f"{at}.role",
                code="invalid_value",
            )


def _of_turn(turn: Turn, at: str, is_strict: bool) -> Iterator[str]:
    where = at.partition(".")[0]
    for name in _dropped(turn, "message", at, is_strict):
        yield f"{where}.{name}"
    if not isinstance(turn.content, list):
        return
    for number, part in enumerate(turn.content):
        place = f"{at}.content.{number}"
        if part.type in _OWN_THOUGHTS:
            if is_strict:
                raise _unread(part, place)
            yield f"{where}.content.{part.type}"
            continue  # it goes as a whole
        if not part.is_read:
            raise _unread(part, place)
        if part.said is None:
            wanted = "refusal" if part.type == "refusal" else "text"
            raise ApiError(
                400,
                f"{place} is of the type {part.type!r} and has no {wanted}; pass a string.",
                param=f"{place}.{wanted}",
                code="invalid_value",
            )
        for name in _dropped(part, "part", place, is_strict):
            yield f"{where}.content.{name}"
    turn.content = [part for part in turn.content if part.is_read]


def _of_options(options: BaseModel, name: str, is_strict: bool) -> Iterator[str]:
    """Drop what an object of options holds beside what its schema knows."""
    for key, value in _extra(options).items():
        if is_strict:
            raise _unknown(f"{name}.{key}")
        if _holds_something(value):
            yield f"{name}.{key}"
    _clear(options)


def _dropped(body: BaseModel, place: FieldPlace, at: str, is_strict: bool) -> Iterator[str]:
    """Drop what the table ignores, yield what of it held something, and refuse the rest."""
    is_inner = place in ("message", "part")
    for name, value in _extra(body).items():
        param, rule = f"{at}.{name}" if at else name, RULES.get((place, name))
        if rule is not None and rule.treatment == "refused":
            if not rule.asks_for_nothing(value):
                raise unsupported(param, f"{rule.why}.")
        elif not _is_let_in(rule, is_inner=is_inner, is_strict=is_strict):
            raise _unknown(param)
        elif _holds_something(value):
            yield name
    _clear(body)


def _is_let_in(rule: FieldRule | None, *, is_inner: bool, is_strict: bool) -> bool:
    if rule is None:
        return is_inner and not is_strict
    return rule.in_strict or not is_strict


def _extra(body: BaseModel) -> dict[str, object]:
    return body.model_extra or {}


def _clear(body: BaseModel) -> None:
    extra = _extra(body)
    body.model_fields_set.difference_update(extra)
    extra.clear()


def _holds_something(value: object) -> bool:
    return value is not None and value not in ("", [], {})


def _unknown(param: str) -> ApiError:
    shown = param[:200]
    return ApiError(
        400,
        f"Unrecognized request argument supplied: {shown}",
        param=shown,
        code="unknown_parameter",
    )


def _unread(part: Part, at: str) -> ApiError:
    kind = _NOT_READ.get(part.type)
    what = f"is {kind}" if kind else f"is of the type {part.type[:64]!r}"
    return unsupported(
        f"{at}.type", f"this part {what}, and only text is read and guarded; send text alone."
    )
