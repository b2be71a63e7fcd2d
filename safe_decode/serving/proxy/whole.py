"""Whole answers of an upstream, written anew for a reader once every part has its mark.

Knows the bodies of the three endpoints. Does not know HTTP or streams.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from safe_decode.serving.proxy.anthropic_relay import message_end, message_head
from safe_decode.serving.proxy.choices import End, end_of, piece_of, written
from safe_decode.serving.proxy.fields import count_of, list_of, object_of, parsed, text_of, word_of
from safe_decode.serving.proxy.openai_relay import head_of
from safe_decode.serving.proxy.requests import MESSAGES, ProxiedAsk

__all__ = ["Whole", "whole_of"]

_MAX_BLOCKS = 64


class Whole(NamedTuple):
    """A whole answer.

    Attributes:
        body: For the reader.
        ends: How each of its choices has ended.
    """

    body: dict[str, Any]
    ends: list[End]


def whole_of(data: bytes, ask: ProxiedAsk, bundle: str) -> Whole:
    """Read a whole answer and write it anew.

    Args:
        data: The upstream's body.
        ask: What the reader asked for.
        bundle: The mark of the guard that is expected.

    Raises:
        ValueError: A choice lacks its mark, is missing or was not asked for, or a value is of a
            wrong type.
    """
    body = parsed(data)
    return _message(body, ask, bundle) if ask.path == MESSAGES else _choices(body, ask, bundle)


def _choices(body: dict[str, Any], ask: ProxiedAsk, bundle: str) -> Whole:
    told: dict[int, dict[str, Any]] = {}
    ends = []
    for value in list_of(body.get("choices"), most=ask.n_choices):
        choice = object_of(value)
        index, end = count_of(choice.get("index")), end_of(choice, bundle)
        if end is None or index >= ask.n_choices or index in told:
            raise ValueError("a choice has no end, or was not asked for")
        piece = piece_of(choice, ask, is_whole=True)
        told[index] = written(index, piece, ask, is_whole=True, end=end)
        ends.append(end)
    if len(told) != ask.n_choices:
        raise ValueError(f"{len(told)} choices came, {ask.n_choices} were asked for")
    usage = object_of(body.get("usage"))
    prompt, shown = (count_of(usage.get(f"{name}_tokens", 0)) for name in ("prompt", "completion"))
    return Whole(
        {
            **head_of(ask, bundle),
            "choices": [told[index] for index in sorted(told)],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": shown,
                "total_tokens": prompt + shown,
            },
        },
        ends,
    )


def _message(body: dict[str, Any], ask: ProxiedAsk, bundle: str) -> Whole:
    end, stop = message_end(body, ask, bundle)
    content = []
    for value in list_of(body.get("content"), most=_MAX_BLOCKS):
        block = object_of(value)
        word_of(block.get("type"), ("text",))
        content.append({"type": "text", "text": text_of(block.get("text"))})
    usage = object_of(body.get("usage"))
    return Whole(
        {
            **message_head(ask),
            "content": content,
            "stop_reason": end.reason,
            "stop_sequence": stop,
            "usage": {
                name: count_of(usage.get(name, 0)) for name in ("input_tokens", "output_tokens")
            },
            "safety": end.safety,
        },
        [end],
    )
