"""Conversations as token ids: the template, the assistant turn, the ids that end it.

Knows roles and the tokenizer's own chat template; no other module does. Does not
know how models run, probes, or batches of a running call.

Text from outside is text (`plain_text`): a control token spelt in a message or a prefill is
encoded as ordinary characters, so that a message cannot open a turn of its own. Where a
tokenizer cannot do that, such a message is refused. The turn's start is known from how the ids were
made, never searched for, unless only ids are given (`turn_headers`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safe_decode.errors import PromptError
from safe_decode.prompts.plain_text import controls_of, encoding, text_ids
from safe_decode.prompts.turn_headers import assistant_header, open_turn_start
from safe_decode.typing import CausalLM, Tokenizer

__all__ = [
    "ChatBatch",
    "EncodedChat",
    "Message",
    "Prompt",
    "assistant_header",
    "encode_batch",
    "left_padded",
    "encode_chat",
    "open_turn_start",
    "require_room",
    "stop_ids",
    "text_ids",
]

Message = Mapping[str, Any]
"""With "role" and "content"."""
Prompt = str | Sequence[Message]
"""A string is one message of the user."""

_MOST_SPELT = 256
"""Control tokens in the messages of one prompt: each is encoded on its own."""
_LOOKED_AT = 8_000_000
"""Characters of a message that spells one, times control tokens: some 30 ms."""
_ROLE = re.compile(r"[a-z][a-z_]*")


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A prompt with its open assistant turn.

    Attributes:
        ids: Token ids, the supplied prefill last.
        turn_start: Index of the turn's first token y_0, which the model writes unless there
            is a prefill; s_0 is read at turn_start - 1.
    """

    ids: tuple[int, ...]
    turn_start: int

    @property
    def prefill_tokens(self) -> int:
        """Tokens of the answer that came with the prompt."""
        return len(self.ids) - self.turn_start


@dataclass(frozen=True, slots=True, eq=False)
class ChatBatch:
    """Prompts padded on the left to one length.

    Attributes:
        input_ids: [batch, seq] int64.
        attention_mask: [batch, seq] int64, 0 on padding.
        turn_tokens: [batch] int64 on the CPU, prefill tokens of each row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    turn_tokens: Tensor


def encode_chat(
    tokenizer: Tokenizer,
    messages: Prompt,
    *,
    prefill: str | None = None,
    variables: Mapping[str, object] | None = None,
) -> EncodedChat:
    """Encode a prompt by the tokenizer's own template, its assistant turn open.

    Args:
        tokenizer: With a chat template.
        messages: A string, or messages; a last message of the assistant is a prefill, to
            be continued.
        prefill: Beginning of the answer, put into the model's mouth.
        variables: Of the template, as `template_variables.variables_read` lets them pass.

    Raises:
        PromptError: Nothing to answer, no chat template, a role or content that cannot be
            encoded safely, a template that refuses the messages, or two prefills.
    """
    turns = _checked_messages(messages)
    if turns[-1]["role"] == "assistant":
        if prefill:
            raise PromptError(
                "prefill and a last message of the assistant are two beginnings of one answer; "
                "pass one of them."
            )
        prefill = str(turns[-1]["content"])
        turns = turns[:-1]
    if not any(str(turn["content"]).strip() for turn in turns):
        raise PromptError("the prompt is empty; pass a message with at least one character.")
    head = _rendered_ids(tokenizer, turns, variables or {})
    bos = getattr(tokenizer, "bos_token_id", None)
    while bos is not None and head[:2] == [bos, bos]:
        head = head[1:]  # a template that writes BOS beside a tokenizer that adds it
    if not head:
        raise PromptError("the chat template yields no token; pass a tokenizer with its template.")
    begun = text_ids(tokenizer, prefill) if prefill else ()
    return EncodedChat(ids=(*head, *begun), turn_start=len(head))


def encode_batch(
    tokenizer: Tokenizer,
    chats: Sequence[EncodedChat],
    device: torch.device | str,
) -> ChatBatch:
    """Pad prompts on the left.

    Args:
        tokenizer: Whose pad id is used; without one its end id, masked all the same.
        chats: At least one.
        device: Where the tensors go.

    Raises:
        PromptError: No chats.
    """
    if not chats:
        raise PromptError("there is no prompt; pass at least one.")
    ids, mask = left_padded(tokenizer, [chat.ids for chat in chats])
    turns = torch.tensor([chat.prefill_tokens for chat in chats])
    return ChatBatch(ids.to(device), mask.to(device), turns)


def left_padded(
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """Pad rows of ids on the left.

    Args:
        tokenizer: Whose pad id is used; without one its end id, masked all the same.
        rows: At least one.

    Returns:
        Ids and attention mask, [batch, seq] int64 each.
    """
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def require_room(n_tokens: int, context_tokens: int | None, *, new_tokens: int = 1) -> None:
    """Check that a prompt leaves room for an answer.

    Args:
        n_tokens: Of the prompt, without padding.
        context_tokens: The model's `max_position_embeddings`; None: it has no limit.
        new_tokens: Tokens that must fit behind it.

    Raises:
        PromptError: They do not.
    """
    if context_tokens is not None and n_tokens + new_tokens > context_tokens:
        raise PromptError(
            f"the prompt has {n_tokens} tokens and {new_tokens} must follow, the model's context "
            f"is {context_tokens}; shorten the prompt or ask for fewer tokens."
        )


def stop_ids(model: CausalLM, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Return the ids at which bare `generate` ends a row, the preferred one first.

    From the generation config, else the model's config, else the tokenizer; empty if none
    of them has one.
    """
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(source, "eos_token_id", None)
        if ends is not None:
            return tuple(dict.fromkeys([ends] if isinstance(ends, int) else ends))
    end = getattr(tokenizer, "eos_token_id", None)
    return () if end is None else (int(end),)


def _checked_messages(messages: Prompt) -> list[Message]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    turns: list[Any] = list(messages)
    if not turns:
        raise PromptError("the prompt is empty; pass a string or at least one message.")
    for number, message in enumerate(turns):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            # A template that joins the role into a control token could be led to write any.
            raise PromptError(
                f"message {number} has role={role!r}, wanted a word such as 'user', 'assistant' "
                "or 'system'; pass mappings with role and content."
            )
        if not isinstance(message.get("content"), str):
            raise PromptError(
                f"message {number} has content of type {type(message.get('content')).__name__}, "
                "wanted a string; only text is guarded."
            )
    return turns


def _rendered_ids(
    tokenizer: Tokenizer, turns: Sequence[Message], variables: Mapping[str, object]
) -> list[int]:
    from jinja2 import TemplateError  # chat templates need it; the rest of the package does not

    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "the tokenizer has no chat template; set tokenizer.chat_template, or pass input_ids."
        )
    render = tokenizer.apply_chat_template
    options: dict[str, Any] = {
        **variables,
        "add_generation_prompt": True,
        "return_dict": False,
    }
    known = inspect.signature(render).parameters
    if "tokenizer_kwargs" in known:
        options["tokenizer_kwargs"] = {"return_attention_mask": False}
    can_sanitize = "sanitize_control_tokens" in known
    if _spells_controls(tokenizer, turns, can_sanitize=can_sanitize):
        options["sanitize_control_tokens"] = True
    try:
        with encoding:
            ids = render([dict(turn) for turn in turns], **options)
        return [int(i) for i in ids]
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise PromptError(
            f"the chat template refuses these messages: {error}; check their roles and order."
        ) from error


def _spells_controls(
    tokenizer: Tokenizer,
    turns: Sequence[Message],
    *,
    can_sanitize: bool,
) -> bool:
    """Say whether a message spells a control token, and refuse what would take seconds to encode.

    transformers looks for every control token at every character, in one call that no other
    thread interrupts, and encodes each one it finds on its own.
    """
    controls = controls_of(tokenizer)
    found = controls.spelt_in([turn["content"] for turn in turns])
    for number, (turn, spelt) in enumerate(zip(turns, found, strict=True)):
        if not spelt:
            continue
        what = f"message {number} spells the control token {spelt[0]!r}"
        if not can_sanitize:
            raise PromptError(
                f"{what}, which this version of transformers cannot encode as ordinary text; "
                "remove it or upgrade."
            )
        room = _LOOKED_AT // len(controls.spellings)
        if len(turn["content"]) > room:
            raise PromptError(
                f"{what} among {len(turn['content'])} characters; beside it at most {room} can be "
                "encoded as ordinary text. Remove it or shorten the message."
            )
    total = sum(map(len, found))
    if total > _MOST_SPELT:
        raise PromptError(
            f"the messages spell control tokens {total} times, at most {_MOST_SPELT} are encoded "
            "as ordinary text; remove them."
        )
    return total > 0
