"""The forwards that a loop runs by itself: what was cached is read again, and the last tokens.

Knows models, their caches and the arguments of a forward. Does not know scores, rows that
tripped, or what is read meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from safe_decode.engines.transformers.loops.settings import (
    PrefillSpan,
    forget,
    tail_inputs,
    whole_inputs,
)

__all__ = ["OwnForwards", "continued"]


def continued(model: Any, ids: Tensor, n_tokens: int, ends: Collection[int]) -> list[int]:  # noqa: ANN401
    """Continue one row greedily, with a cache of its own.

    Args:
        model: Duck-typed.
        ids: [1, seq] without padding.
        n_tokens: At most so many ids.
        ends: End ids; the one that is reached is the last.
    """
    said: list[int] = []
    cache, step = None, ids
    while len(said) < n_tokens and not (said and said[-1] in ends):
        output = model(input_ids=step, past_key_values=cache, use_cache=True, return_dict=True)
        cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
        said.append(int(step))
    return said


class OwnForwards:
    """For one call of `generate`, made before its first forward.

    Args:
        model: Duck-typed.
        input_ids: [batch, seq] prompts.
        config: The prepared GenerationConfig.
        model_kwargs: What the forward takes.

    Attributes:
        positions: How many positions the prompt's own forward reads.
        room: New tokens for which the cache has places; None: it grows.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        input_ids: Tensor,
        config: Any,  # noqa: ANN401
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

        That is so where a turn is continued call by call. Nobody knows that they were judged
        then, so they pass once more.
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
