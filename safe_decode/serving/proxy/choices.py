"""The choices of OpenAI's two endpoints: read from an upstream, and written anew for a reader.

Knows content, refusal, ids, log-probabilities and ends. Does not know streams, hold-back or
HTTP. Fields that are not read here (`tool_calls`, `function_call`, `reasoning_content`, `audio`
and what will be invented) do not exist for the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safe_decode.serving.proxy.fields import (
    TURNED,
    ids_of,
    list_of,
    number_of,
    object_of,
    safety_of,
    text_of,
    word_of,
)
from safe_decode.serving.proxy.requests import CHAT, ProxiedAsk
from safe_decode.serving.schemas.notice import WITHHELD

__all__ = ["End", "Piece", "end_of", "piece_of", "written"]

_FINISHES = ("stop", "length", "content_filter")
_MAX_TOP = 20
_MAX_ENTRIES = 65_536


@dataclass(frozen=True)
class Piece:
    """What a choice says.

    Attributes:
        content: Text.
        refusal: Text of the guard.
        ids: Of the text.
        logprobs: Written anew, or None.
        is_redirect: It is what follows a trip.
        tells_trip: It says that the response has tripped.
        is_withheld: It says that nothing of the response is shown. The sentence is known, so it
            needs no ids, and is written by the proxy once the end is marked.
    """

    content: str = ""
    refusal: str = ""
    ids: tuple[int, ...] = ()
    logprobs: Mapping[str, Any] | None = None
    is_redirect: bool = False
    tells_trip: bool = False
    is_withheld: bool = False


@dataclass(frozen=True)
class End:
    """How a response has ended.

    Attributes:
        reason: Finish or stop reason.
        safety: Written anew.
        has_turned: Whether the guard ended it otherwise than the model would have.
    """

    reason: str
    safety: Mapping[str, Any]
    has_turned: bool


def piece_of(choice: Mapping[str, Any], ask: ProxiedAsk, *, is_whole: bool) -> Piece:
    """Read what a choice says.

    Args:
        choice: Of the upstream.
        ask: Says which endpoint it is, and what the reader wants.
        is_whole: It is a whole answer, whose mark stands beside it; a chunk needs ids.

    Raises:
        ValueError: A value is of a wrong type, a text has no ids, or a token more than its id.
    """
    if ask.path == CHAT:
        box = object_of(choice.get("message" if is_whole else "delta"))
        content, refusal = box.get("content"), box.get("refusal")
    else:
        content, refusal = choice.get("text"), choice.get("refusal")
    ids = ids_of(choice.get("token_ids"))
    if not is_whole and not ids and refusal == WITHHELD:
        return Piece(is_redirect=True, tells_trip=True, is_withheld=True)
    n_ids = None if is_whole else len(ids)
    said, refused = text_of(content, n_ids=n_ids), text_of(refusal, n_ids=n_ids)
    safety = object_of(choice.get("safety"))
    is_redirect = bool(refused) or safety.get("by") == "redirect"
    if refused and said != refused and not is_whole:
        said = ""  # one chunk holds words of the model or of the guard
    logprobs = None
    if ask.has_logprobs and (is_whole or not is_redirect):
        most = _MAX_ENTRIES if is_whole else len(ids)
        read = _chat_logprobs if ask.path == CHAT else _completion_logprobs
        logprobs = read(choice.get("logprobs"), most)
    return Piece(
        content=said,
        refusal=refused,
        ids=ids,
        logprobs=logprobs,
        is_redirect=is_redirect,
        tells_trip=is_redirect or bool(safety.get("trip")) or safety.get("action") in TURNED,
    )


def end_of(choice: Mapping[str, Any], bundle: str) -> End | None:
    """Read how a choice has ended; None: it has not.

    Raises:
        ValueError: The end is unknown, or lacks the mark of the bundle.
    """
    reason = choice.get("finish_reason")
    if reason is None:
        return None
    word_of(reason, _FINISHES)
    safety = safety_of(choice.get("safety"), bundle)
    if safety["action"] in TURNED:
        reason = "content_filter"
    return End(reason, safety, has_turned=reason == "content_filter")


def written(
    index: int, piece: Piece, ask: ProxiedAsk, *, is_whole: bool, end: End | None = None
) -> dict[str, Any]:
    """Write a choice for the reader.

    Args:
        index: Of the choice.
        piece: What it says.
        ask: Says which endpoint it is, and what the reader wants.
        is_whole: Whether it is a whole answer.
        end: How it has ended; None: it goes on.
    """
    choice: dict[str, Any] = {"index": index}
    if ask.path != CHAT:
        choice |= {"text": piece.content}
        if is_whole or piece.refusal:
            choice["refusal"] = piece.refusal or None
    elif is_whole:
        refusal = piece.refusal or None
        choice["message"] = {"role": "assistant", "content": piece.content, "refusal": refusal}
    else:
        said = {"content": piece.content, "refusal": piece.refusal}
        choice["delta"] = {name: text for name, text in said.items() if text}
    choice |= {"logprobs": piece.logprobs, "finish_reason": None if end is None else end.reason}
    if ask.keeps_ids and piece.ids:
        choice["token_ids"] = list(piece.ids)
    return choice if end is None else {**choice, "safety": end.safety}


def _chat_logprobs(value: object, most: int) -> dict[str, Any] | None:
    if value is None:
        return None
    entries = list_of(object_of(value).get("content"), most=most)
    content = []
    for entry in entries:
        top = list_of(object_of(entry).get("top_logprobs"), most=_MAX_TOP)
        content.append({**_token(entry), "top_logprobs": [_token(one) for one in top]})
    return {"content": content, "refusal": None}


def _token(entry: object) -> dict[str, Any]:
    told = object_of(entry)
    text = text_of(told.get("token"), n_ids=1)
    return {"token": text, "logprob": number_of(told.get("logprob")), "bytes": list(text.encode())}


def _completion_logprobs(value: object, most: int) -> dict[str, Any] | None:
    if value is None:
        return None
    told = object_of(value)
    tokens = [text_of(one, n_ids=1) for one in list_of(told.get("tokens"), most=most)]
    values = [number_of(one) for one in list_of(told.get("token_logprobs"), most=most)]
    offsets = [number_of(one) for one in list_of(told.get("text_offset"), most=most)]
    top = [_alternatives(one) for one in list_of(told.get("top_logprobs"), most=most)]
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _alternatives(value: object) -> dict[str, int | float | None]:
    told = object_of(value)
    if len(told) > _MAX_TOP:
        raise ValueError(f"{len(told)} alternatives of a token, wanted at most {_MAX_TOP}")
    return {text_of(text, n_ids=1): number_of(number) for text, number in told.items()}
