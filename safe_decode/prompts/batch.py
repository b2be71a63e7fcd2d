"""Prompts of every accepted form, as one left-padded batch and the positions to be judged.

Knows strings, conversations and raw ids, and how much of each prompt is the open assistant
turn. Does not know roles or templates (that is `chat`), models, or what a score is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from safe_decode.errors import ConfigurationError, PromptError, UnsupportedError
from safe_decode.host_copies import sent
from safe_decode.prompts.chat import (
    encode_batch,
    encode_chat,
    left_padded,
    open_turn_start,
    require_room,
)
from safe_decode.typing import Tokenizer

__all__ = [
    "RAW_WINDOW_TOKENS",
    "PromptBatch",
    "Prompts",
    "from_embeds",
    "from_ids",
    "from_prompts",
    "from_row_ids",
]

Message = Mapping[str, str]
Prompts = str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]]

RAW_WINDOW_TOKENS = 64
"""Prompt tokens judged for a raw completion, which has no assistant turn to scan."""


@dataclass(frozen=True)
class PromptBatch:
    """A batch and what of it is judged.

    Attributes:
        input_ids: [batch, seq] int64, left-padded.
        attention_mask: [batch, seq] int64, 0 on padding.
        scanned: For each row, trailing positions that the prefill's forward judges: s_0 and
            the supplied prefill, or the window of a raw completion.
        prefill_tokens: For each row, trailing ids that are supplied prefill.
        is_chat: For each row, whether it has an open assistant turn.
        embeds: [batch, seq, d_model] instead of ids, or None; `input_ids` are then [batch, 0].
        on_host: `input_ids` and `attention_mask` on the host, so that nobody asks a device for
            them again; None: as they are.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scanned: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    is_chat: tuple[bool, ...]
    embeds: Tensor | None = None
    on_host: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    def repeated(self, n_times: int) -> PromptBatch:
        """Repeat each row, as num_return_sequences does; the tensors stay as they are."""

        def repeat(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(value for value in values for _ in range(n_times))

        return replace(
            self,
            scanned=repeat(self.scanned),
            prefill_tokens=repeat(self.prefill_tokens),
            is_chat=repeat(self.is_chat),
        )

    def prompt_ids(self, row: int) -> list[int]:
        """Return a row's prompt without padding; `row` counts repeated rows."""
        source = row // (len(self.scanned) // self.attention_mask.shape[0])
        if self.embeds is not None:
            return []
        input_ids, mask = self.on_host or (self.input_ids, self.attention_mask)
        n_tokens = int(mask[source].sum())
        ids: list[int] = input_ids[source, input_ids.shape[1] - n_tokens :].tolist()
        return ids

    @property
    def lengths(self) -> list[int]:
        """Count each prompt's tokens without padding, repeated ones once."""
        mask = self.attention_mask if self.on_host is None else self.on_host[1]
        counts: list[int] = mask.long().sum(-1).tolist()
        return counts

    def to(self, device: torch.device) -> PromptBatch:
        """Return the batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=sent(self.input_ids, device),
            attention_mask=sent(self.attention_mask, device),
            on_host=self.on_host or (self.input_ids.cpu(), self.attention_mask.cpu()),
        )

    def require_room(self, context_tokens: int | None) -> None:
        """Check that the longest prompt leaves room for one token.

        Raises:
            PromptError: It does not.
        """
        require_room(max(self.lengths), context_tokens)


def from_prompts(
    tokenizer: Tokenizer,
    prompts: Prompts,
    prefill: str | Sequence[str | None] | None,
    device: torch.device,
) -> PromptBatch:
    """Encode prompts as chats.

    Args:
        tokenizer: With a chat template.
        prompts: One prompt, several, one conversation (messages), or several.
        prefill: The beginning of the answer, one for all prompts or one each.
        device: Where the batch goes.

    Raises:
        PromptError: Nothing to encode, an empty prompt, or no chat template.
        ConfigurationError: A prefill for another number of prompts.
    """
    chats = _as_chats(prompts)
    prefills = [prefill] * len(chats) if prefill is None or isinstance(prefill, str) else prefill
    if len(prefills) != len(chats):
        raise ConfigurationError(
            f"prefill has {len(prefills)} entries for {len(chats)} prompts; pass one each."
        )
    encoded = [
        encode_chat(tokenizer, chat, prefill=begun)
        for chat, begun in zip(chats, prefills, strict=True)
    ]
    batch = encode_batch(tokenizer, encoded, "cpu")
    turns = tuple(int(n) for n in batch.turn_tokens)
    return PromptBatch(
        batch.input_ids,
        batch.attention_mask,
        tuple(n + 1 for n in turns),
        turns,
        (True,) * len(turns),
    ).to(device)


def from_ids(
    tokenizer: Tokenizer,
    input_ids: Tensor,
    attention_mask: Tensor | None,
) -> PromptBatch:
    """Take ids as `model.generate` takes them and find the open assistant turn of each row.

    Args:
        tokenizer: Whose template tells where a turn is open.
        input_ids: [batch, seq] integers, left-padded.
        attention_mask: [batch, seq]; None: pad ids on the left are padding.

    Raises:
        PromptError: An empty batch or row, or not two dimensions.
        UnsupportedError: Padding on the right or inside a prompt.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
        shape = tuple(getattr(input_ids, "shape", ()))
        raise PromptError(
            f"input_ids has shape {shape}, wanted [batch, seq] with at least one id; pass the ids "
            "of a prompt."
        )
    mask = _left_mask(tokenizer, input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise PromptError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}; "
            "pass a mask of the same shape."
        )
    # Ids of a device come to the host once; from here on nothing asks for them.
    host_ids, host_mask = input_ids.cpu(), mask.cpu()
    _require_left_padding(host_mask)
    lengths = host_mask.long().sum(-1).tolist()
    starts = [
        open_turn_start(tokenizer, row[-n:])
        for row, n in zip(host_ids.tolist(), lengths, strict=True)
    ]
    return PromptBatch(
        input_ids,
        mask,
        tuple(
            min(n, RAW_WINDOW_TOKENS) if start is None else min(n, n - start + 1)
            for n, start in zip(lengths, starts, strict=True)
        ),
        tuple(0 if s is None else n - s for n, s in zip(lengths, starts, strict=True)),
        tuple(start is not None for start in starts),
        on_host=(host_ids, host_mask),
    )


def from_row_ids(
    tokenizer: Tokenizer,
    ids: Sequence[Sequence[int]],
    *,
    scanned: Sequence[int],
    prefill_tokens: Sequence[int],
    is_chat: Sequence[bool],
) -> PromptBatch:
    """Pad prompts that were encoded row by row; see `PromptBatch` for the arguments."""
    padded, mask = left_padded(tokenizer, ids)
    return PromptBatch(
        padded,
        mask,
        tuple(scanned),
        tuple(prefill_tokens),
        tuple(is_chat),
    )


def from_embeds(embeds: Tensor, attention_mask: Tensor | None) -> PromptBatch:
    """Take embeddings as `model.generate` takes them; they are judged as a raw completion.

    Args:
        embeds: [batch, seq, d_model], left-padded.
        attention_mask: [batch, seq]; None: no padding.

    Raises:
        PromptError: Not three dimensions, nothing in a row, or a mask of another shape.
        UnsupportedError: Padding on the right or inside a prompt.
    """
    if not isinstance(embeds, Tensor) or embeds.ndim != 3 or embeds.numel() == 0:
        shape = tuple(getattr(embeds, "shape", ()))
        raise PromptError(
            f"inputs_embeds has shape {shape}, wanted [batch, seq, d_model] with at least one "
            "position; pass the embeddings of a prompt."
        )
    ids = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    if mask.shape != ids.shape:
        raise PromptError(
            f"attention_mask has shape {tuple(mask.shape)}, inputs_embeds "
            f"{tuple(embeds.shape)}; pass a mask of its first two dimensions."
        )
    _require_left_padding(mask)
    lengths = mask.long().sum(-1).tolist()
    return PromptBatch(
        ids[:, :0],
        mask,
        tuple(min(n, RAW_WINDOW_TOKENS) for n in lengths),
        (0,) * len(lengths),
        (False,) * len(lengths),
        embeds,
    )


def _as_chats(prompts: Prompts) -> list[Any]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping)):
        return [prompts]
    chats = list(prompts)
    if not chats:
        raise PromptError("prompts is empty; pass at least one prompt.")
    return chats


def _left_mask(tokenizer: Tokenizer, input_ids: Tensor) -> Tensor:
    # Only a pad id that means nothing else tells padding from text, as in transformers.
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad == end:
        return torch.ones_like(input_ids)
    mask: Tensor = (input_ids != pad).long()
    return mask


def _require_left_padding(mask: Tensor) -> None:
    if bool((mask.sum(-1) == 0).any()):
        raise PromptError("a row of input_ids is all padding; pass at least one id in each row.")
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise UnsupportedError(
            "right_padding=True is refused: padding after the prompt would be scored as text; set "
            "tokenizer.padding_side='left' and pass the attention mask."
        )
