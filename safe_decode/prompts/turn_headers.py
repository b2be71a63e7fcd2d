"""Headers of turns as ids: where the open assistant turn of raw ids begins.

Knows what a chat template writes between known texts. Does not know how messages are encoded.
"""

from __future__ import annotations

from collections.abc import Sequence

from safe_decode.errors import PromptError
from safe_decode.prompts.plain_text import encoding
from safe_decode.typing import Tokenizer

__all__ = ["assistant_header", "open_turn_start"]


def open_turn_start(tokenizer: Tokenizer, ids: Sequence[int]) -> int | None:
    """Find where the open assistant turn of raw ids begins.

    The first assistant header behind the last header of a user: a header repeated inside a
    turn does not move the start forward, which would hide what stands before it.

    Args:
        tokenizer: Whose chat template tells the headers.
        ids: A prompt without padding.

    Returns:
        Index of y_0; len(ids) where the header is last. None for raw completions: no chat
        template, no assistant header, or a turn of the user after it.
    """
    marks = _marks(tokenizer)
    if marks is None:
        return None
    user, assistant = marks
    sequence = list(ids)
    last_user = _find_last(sequence, user) if user else -1
    start = max(last_user, 0)
    found = _find_first(sequence, assistant, start)
    return None if found < 0 else found + len(assistant)


def assistant_header(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of the assistant's header, as the template writes it after a message.

    Raises:
        PromptError: No chat template, or one whose header cannot be told by example.
    """
    marks = _marks(tokenizer)
    if marks is None:
        raise PromptError(
            "the assistant's header cannot be read from the chat template; pass a tokenizer with "
            "a template of user and assistant, or no self_check."
        )
    return tuple(marks[1])


def _marks(tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """The ids of the user's and of the assistant's header, from rendering known texts."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return None
    user, assistant, again = "qXq", "zYz", "vWv"
    turns = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
        {"role": "user", "content": again},
    ]
    render = tokenizer.apply_chat_template
    try:
        closed = render(turns, tokenize=False)
        opened = render(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return None  # a template of other roles; its headers cannot be learnt by example
    if not all(text in closed for text in (user, assistant, again)):
        return None
    to_assistant = closed.split(user)[1].split(assistant)[0]
    to_user = closed.split(assistant)[1].split(again)[0]
    header = opened.removeprefix(closed) if opened.startswith(closed) else ""
    # Without a generation prompt the header is what stands before an answer ("[/INST]").
    ids = _template_ids(tokenizer, header or to_assistant)
    return (_template_ids(tokenizer, to_user), ids) if ids else None


def _template_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    with encoding:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def _find_first(ids: Sequence[int], wanted: Sequence[int], start: int) -> int:
    """Find a run of ids, in steps from one place that begins like it to the next."""
    last = len(ids) - len(wanted)
    at = start
    while at <= last:
        try:
            at = ids.index(wanted[0], at, last + 1)
        except ValueError:
            return -1
        if ids[at : at + len(wanted)] == wanted:
            return at
        at += 1
    return -1


def _find_last(ids: Sequence[int], wanted: Sequence[int]) -> int:
    found = _find_first(ids[::-1], wanted[::-1], 0)
    return -1 if found < 0 else len(ids) - len(wanted) - found
