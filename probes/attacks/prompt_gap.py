"""Where the free tokens of a suffix stand: after the user's words, before the open answer.

Knows how a conversation becomes ids around a gap, and which ids an attacker can type. Does not
know models, losses or how the gap is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from probes.data.conversations import Message
from safe_decode.errors import PromptError
from safe_decode.prompts.chat import encode_chat
from safe_decode.typing import Tokenizer

__all__ = ["PromptGap", "typeable_ids"]

_MARKS = (" x", " y")  # of two, one differs from the last word of any message


@dataclass(frozen=True, eq=False)
class PromptGap:
    """A conversation with a gap at the end of the user's last message.

    Attributes:
        tokenizer: Of the model.
        messages: Without the gap.
        head: Ids up to the gap.
        tail: Ids behind it: the rest of the template, up to the position that reads s_0.
    """

    tokenizer: Tokenizer
    messages: tuple[Message, ...]
    head: tuple[int, ...]
    tail: tuple[int, ...]

    @classmethod
    def around(cls, tokenizer: Tokenizer, messages: Sequence[Message]) -> PromptGap:
        """Find the gap by encoding the conversation with other last words.

        Raises:
            PromptError: The template writes nothing behind the user's message, or changes it.
        """
        plain = encode_chat(tokenizer, messages).ids
        tails = []
        for mark in _MARKS:
            marked = encode_chat(tokenizer, _appended(messages, mark)).ids
            tails.append(_common_tail(plain, marked))
        length = min(tails)
        if not 0 < length < len(plain):
            raise PromptError(
                "the chat template leaves no fixed ids behind the user's message, so a suffix has "
                "no place; pass a tokenizer with a template that opens the assistant's turn."
            )
        cut = len(plain) - length
        return cls(tokenizer, tuple(messages), tuple(plain[:cut]), tuple(plain[cut:]))

    def text_of(self, ids: Sequence[int]) -> str:
        """Spell the ids of a gap."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def filled(self, ids: Sequence[int]) -> tuple[Message, ...]:
        """Return the messages whose last one ends in these ids, as text."""
        return _appended(self.messages, self.text_of(ids))

    def is_typeable(self, ids: Sequence[int]) -> bool:
        """Say whether typing the text of these ids yields these ids again."""
        wanted = (*self.head, *ids, *self.tail)
        return tuple(encode_chat(self.tokenizer, self.filled(ids)).ids) == wanted


def typeable_ids(tokenizer: Tokenizer, vocab: int) -> tuple[int, ...]:
    """List the ids that spell printable ASCII and are no control tokens.

    Args:
        tokenizer: Of the model.
        vocab: Rows of the model's embedding, which may be more than the tokenizer knows.
    """
    control = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    found = []
    for index in range(min(vocab, len(tokenizer))):
        if index in control:
            continue
        text = tokenizer.decode([index], clean_up_tokenization_spaces=False)
        if text and text.isascii() and text.isprintable():
            found.append(index)
    return tuple(found)


def _appended(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    last = messages[-1]
    return (*messages[:-1], {"role": last["role"], "content": last["content"] + text})


def _common_tail(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length
