"""The forwards that a loop runs by itself: what was cached is read again, and the last tokens.

Knows models, their caches and the arguments of a forward. Does not know scores, rows that
tripped, or what is read meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safe_decode.engines.transformers.loops.settings import PreparedSettings
from safe_decode.typing import Cache, CausalLM

__all__ = ["OwnForwards", "PrefillSpan", "continued", "forget", "tail_inputs", "whole_inputs"]


def continued(model: CausalLM, ids: Tensor, n_tokens: int, ends: Collection[int]) -> list[int]:
    """Continue one row greedily, with a cache of its own.

    Args:
        model: See `CausalLM`.
        ids: [1, seq] without padding.
        n_tokens: At most so many ids.
        ends: End ids; the one that is reached is the last.
    """
    said: list[int] = []
    cache: Cache | None = None
    step = ids
    while len(said) < n_tokens and not (said and said[-1] in ends):
        output = model(input_ids=step, past_key_values=cache, use_cache=True, return_dict=True)
        cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
        said.append(int(step))
    return said


class OwnForwards:
    """For one call of `generate`, made before its first forward.

    Args:
        model: See `CausalLM`.
        input_ids: [batch, seq] prompts.
        config: The prepared GenerationConfig.
        model_kwargs: What the forward takes.

    Attributes:
        positions: How many positions the prompt's own forward reads.
        room: New tokens for which the cache has places; None: it grows.
    """

    def __init__(
        self,
        model: CausalLM,
        input_ids: Tensor,
        config: PreparedSettings,
        model_kwargs: dict[str, Any],
    ) -> None:
        self._model, self._kwargs = model, model_kwargs
        self._prompt_tokens = input_ids.shape[1]
        self._span = PrefillSpan.of(input_ids, config, model_kwargs)
        self.positions, self.room = self._span.positions, self._span.room

    def look_ahead(self) -> None:
        """Get ready to read tokens that a cache which outlives the call must forget again."""
        cache = self._kwargs.get("past_key_values")
        if cache is not None and self._span.keeps_cache and cache.is_croppable:
            cache.activate_past_recording()

    def forget_ahead(self, n_said: int) -> None:
        """Take a cache that outlives the call back to what `n_said` new tokens have left in it.

        A cache that cannot be cropped is emptied, see `forget`.
        """
        cache = self._kwargs.get("past_key_values")
        if cache is None or not self._span.keeps_cache:
            return
        left = self._prompt_tokens + n_said - 1
        if int(cache.get_seq_length()) > left:
            forget(cache, left)

    def hides(self, n_positions: int) -> bool:
        """Say whether some of the prompt's last positions are cached, so that none reads them.

        That is so where a turn is continued call by call. Whether they were judged then is not
        known, so they pass once more.
        """
        return self._span.is_partial and n_positions > self.positions

    def read_whole(self, sequences: Tensor) -> None:
        """Read [batch, seq] from the beginning, and leave no cache."""
        inputs = whole_inputs(self._model, sequences, self._kwargs, self._prompt_tokens)
        self._model(**inputs, return_dict=True)

    def read_tail(self, sequences: Tensor) -> None:
        """Read the last column of [batch, seq]; all of it where the cache has no place for it."""
        with torch.no_grad():
            if self._span.keeps_cache or self._span.is_full:
                self.read_whole(sequences)
                return
            inputs = tail_inputs(self._model, sequences, self._prompt_tokens, self._kwargs)
            self._model(**inputs, return_dict=True)


def forget(cache: Cache, n_positions: int) -> None:
    """Take a cache that the user keeps back to its first positions, or empty it.

    For a call in which a row has tripped: what it said is not what stands. An emptied cache
    is filled again by the next call that passes the whole conversation.

    Args:
        cache: Changed in place.
        n_positions: Positions it had before.
    """
    surplus = int(cache.get_seq_length()) - n_positions
    try:
        # A sliding window that has moved on cannot be taken back.
        if not cache.is_croppable or n_positions == 0:
            raise RuntimeError("no crop")
        cache.crop(-surplus)
    except RuntimeError:
        cache.reset()


@dataclass(frozen=True)
class PrefillSpan:
    """What the prompt's forward reads.

    Attributes:
        positions: How many positions pass: those of the prompt that are not cached yet.
        is_partial: Whether positions of the prompt were cached before the call.
        keeps_cache: Whether the cache outlives the call, so that nothing may be added to it.
        is_full: Whether the cache has no place for the last token, as static caches do not.
        room: New tokens for which a cache of fixed size has places; None: it grows.
    """

    positions: int
    is_partial: bool
    keeps_cache: bool
    is_full: bool
    room: int | None = None

    @classmethod
    def of(
        cls, input_ids: Tensor, config: PreparedSettings, model_kwargs: dict[str, Any]
    ) -> PrefillSpan:
        """Read it before the first forward."""
        cache, embeds = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
        cached = 0 if cache is None else int(cache.get_seq_length())
        width = (input_ids if embeds is None else embeds).shape[1]
        is_users = bool(getattr(cache, "_is_user_defined", False))
        is_full = cache is not None and bool(getattr(cache, "is_compileable", False))
        return cls(
            positions=width - cached,
            is_partial=cached > 0,
            keeps_cache=is_users or bool(config.return_dict_in_generate),
            is_full=is_full,
            # The newest token needs no place: the closing forward reads without the cache.
            room=int(cache.get_max_length()) - width + 1 if cache is not None and is_full else None,
        )


def whole_inputs(
    model: CausalLM,
    sequences: Tensor,
    model_kwargs: dict[str, Any],
    prompt_tokens: int,
) -> dict[str, Any]:
    """Prepare a forward over all of `sequences` [batch, seq] that reads and leaves no cache."""
    new = sequences.shape[1] - prompt_tokens
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(sequences[:, :prompt_tokens]) if mask is None else mask
    mask = torch.cat([mask, mask.new_ones((mask.shape[0], new))], -1)
    kwargs = {"attention_mask": mask, "use_cache": False, "past_key_values": None}
    if model_kwargs.get("position_ids") is not None:
        own: Any = model  # a private method of transformers
        kwargs["position_ids"] = own._prepare_position_ids_for_generation(sequences, kwargs)
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(sequences, **kwargs)
    return prepared


def tail_inputs(
    model: CausalLM,
    sequences: Tensor,
    prompt_tokens: int,
    model_kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Prepare the forward that reads the last column of `sequences` [batch, seq]."""
    new = sequences.shape[1] - prompt_tokens
    kwargs = dict(model_kwargs)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        kwargs["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], new))], -1)
    positions = kwargs.get("position_ids")
    if positions is not None:
        later = torch.arange(1, new + 1, device=positions.device, dtype=positions.dtype)
        kwargs["position_ids"] = torch.cat([positions, positions[..., -1:] + later], -1)
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(
        sequences, next_sequence_length=1 if kwargs.get("use_cache") else None, **kwargs
    )
    return prepared
