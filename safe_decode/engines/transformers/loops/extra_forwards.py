"""The forwards that a loop runs by itself: what was cached is read again, and the last tokens.

Knows models, their caches and the arguments of a forward. Does not know scores, rows that
tripped, or what is read meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safe_decode.engines.transformers.loops.settings import PreparedSettings
from safe_decode.typing import Cache, CausalLM

__all__ = [
    "OwnForwards",
    "PrefillSpan",
    "continued",
    "forget",
    "positions_in",
    "tail_inputs",
    "whole_inputs",
]

_CACHE_NAMES = ("past_key_values", "cache_params")
"""Arguments under which a call holds its cache from the beginning on."""


def continued(model: CausalLM, ids: Tensor, n_tokens: int, ends: Collection[int]) -> list[int]:
    """Continue one row greedily, with a cache of its own.

    Args:
        model: See `CausalLM`.
        ids: [1, seq] without padding.
        n_tokens: At most so many ids.
        ends: End ids; the one that is reached is the last.
    """
    said: list[int] = []
    step, kept = ids, {"use_cache": True}
    while len(said) < n_tokens and not (said and said[-1] in ends):
        output = model(input_ids=step, return_dict=True, **kept)
        step = output.logits[:, -1:].argmax(-1)
        said.append(int(step))
        ids = torch.cat([ids, step], -1)
        cache: Any = getattr(output, "past_key_values", None)
        if cache is None:  # its state has a name of its own: the row is read anew
            step, kept = ids, {"use_cache": False}
        else:
            kept = {"use_cache": True, "past_key_values": cache}
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
        cache = _cache_in(self._kwargs)
        if cache is not None and self._span.keeps_cache and cache.is_croppable:
            cache.activate_past_recording()

    def forget_ahead(self, n_said: int, n_chosen: int) -> None:
        """Take a cache that outlives the call back to what `n_said` new tokens have left in it.

        A cache that cannot be cropped is emptied, see `forget`: a recurrent state cannot be taken
        back to what it was some tokens ago.

        Args:
            n_said: New tokens after which bare `generate` ends.
            n_chosen: New tokens that the loop has chosen, unseen ones included.
        """
        cache = _cache_in(self._kwargs)
        if cache is None or not self._span.keeps_cache:
            return
        left, held = self._prompt_tokens + n_said - 1, positions_in(cache)
        if held is None:  # only recurrent states, which count no positions
            if n_chosen > n_said:
                cache.reset()
        elif held > left:
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
        """Read the last column of [batch, seq].

        All of it where the cache has no place for it, outlives the call, or is not at hand, as a
        state that the model itself hands on from step to step.
        """
        uses_state = self._kwargs.get("use_cache") and _cache_in(self._kwargs) is None
        with torch.no_grad():
            if self._span.keeps_cache or self._span.is_full or uses_state:
                self.read_whole(sequences)
                return
            inputs = tail_inputs(self._model, sequences, self._prompt_tokens, self._kwargs)
            self._model(**inputs, return_dict=True)


def positions_in(cache: Cache) -> int | None:
    """Count the positions that a cache holds; None where it holds recurrent states alone."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None


def _cache_in(kwargs: Mapping[str, Any]) -> Cache | None:
    return next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)


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
        cache, embeds = _cache_in(model_kwargs), model_kwargs.get("inputs_embeds")
        cached = 0 if cache is None else positions_in(cache) or 0
        width = (input_ids if embeds is None else embeds).shape[1]
        is_users = bool(getattr(cache, "_is_user_defined", False))
        most = 0
        if cache is not None and bool(getattr(cache, "is_compileable", False)):
            most = int(cache.get_max_length())  # -1 of recurrent states, which hold no positions
        return cls(
            positions=width - cached,
            is_partial=cached > 0,
            keeps_cache=is_users or bool(config.return_dict_in_generate),
            is_full=most > 0,
            # The newest token needs no place: the closing forward reads without the cache.
            room=most - width + 1 if most > 0 else None,
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
    kwargs: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if "past_key_values" in model_kwargs:
        kwargs["past_key_values"] = None
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
