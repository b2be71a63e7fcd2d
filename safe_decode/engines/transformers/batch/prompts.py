"""Prompts of requests as ids, and what of each is judged before its answer begins.

Knows a tokenizer, its model's room and the open turn. Does not know how models run, policies
or HTTP. A text that cannot fit is refused by its length alone, before it is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from safe_decode.engines.rows import RowPrompt
from safe_decode.errors import PromptError
from safe_decode.prompts import chat
from safe_decode.prompts.batch import from_ids
from safe_decode.prompts.template_variables import variables_read
from safe_decode.typing import Tokenizer

__all__ = ["PromptReader"]


class PromptReader:
    """Reads the prompts of one engine.

    Args:
        tokenizer: With a chat template.
        context_tokens: Positions the model has, or None.
        vocab_tokens: Ids that a prompt of ids may hold.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context_tokens: int | None,
        vocab_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._context_tokens, self._vocab_tokens = context_tokens, vocab_tokens
        self._most_chars = _most_chars(tokenizer, context_tokens)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        variables: Mapping[str, object] | None = None,
    ) -> RowPrompt:
        """Encode a conversation.

        Args:
            messages: With role and content.
            variables: Of the chat template; those that it does not read are left out.

        Raises:
            PromptError: It cannot be encoded, or leaves no room for an answer; or a variable may
                not be set.
        """
        self._require_short(sum(len(message["content"]) for message in messages))
        read = variables_read(self._tokenizer, variables or {})
        encoded = chat.encode_chat(self._tokenizer, messages, variables=read)
        chat.require_room(len(encoded.ids), self._context_tokens)
        given = encoded.prefill_tokens
        return RowPrompt(
            encoded.ids, scanned=given + 1, prefill_tokens=given, is_chat=True, variables=read
        )

    def completion(self, prompt: str | Sequence[int]) -> RowPrompt:
        """Encode the beginning of a text, or take its ids.

        Raises:
            PromptError: It is empty, holds foreign ids, or leaves no room.
        """
        tokenizer = self._tokenizer
        if isinstance(prompt, str):
            self._require_short(len(prompt))
            begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            ids = [*begin, *chat.text_ids(tokenizer, prompt)] if prompt else []
        else:
            ids = list(prompt)
            foreign = next((i for i in ids if not 0 <= i < self._vocab_tokens), None)
            if foreign is not None:
                raise PromptError(
                    f"the prompt has the id {foreign}, wanted 0..{self._vocab_tokens - 1}."
                )
        if not ids:
            raise PromptError("the prompt is empty; pass at least one character or id.")
        chat.require_room(len(ids), self._context_tokens)
        inputs = from_ids(tokenizer, torch.tensor([ids]), torch.ones(1, len(ids)).long())
        return RowPrompt(tuple(ids), inputs.scanned[0], inputs.prefill_tokens[0], inputs.is_chat[0])

    def _require_short(self, n_chars: int) -> None:
        if self._most_chars is not None and n_chars > self._most_chars:
            raise PromptError(
                f"the prompt has {n_chars} characters; the {self._context_tokens} tokens of the "
                f"model's context spell at most {self._most_chars}. Shorten the prompt."
            )


def _most_chars(tokenizer: Tokenizer, context_tokens: int | None) -> int | None:
    """Return how many characters a context can hold at most; None where nothing bounds it.

    Where unknown text is one token, however long, or the model has no limit, there is no bound.
    """
    if context_tokens is None or getattr(tokenizer, "unk_token_id", None) is not None:
        return None
    # A token of bytes spells them one by one, so its characters are no more than it is long.
    return context_tokens * max(map(len, tokenizer.get_vocab()))
