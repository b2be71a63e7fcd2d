"""The forwards that a loop runs by itself: what was cached is read again, and the last tokens.

Knows models, their caches and the arguments of a forward. Does not know scores, rows that
tripped, or what is read meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safe_decode.decoding import PrefillSpan, tail_inputs, whole_inputs

__all__ = ["OwnForwards"]


class OwnForwards:
    """For one call of `generate`, made before its first forward.

    Args:
        model: Duck-typed.
        input_ids: [batch, seq] prompts.
        config: The prepared GenerationConfig.
        model_kwargs: What the forward takes.

    Attributes:
        positions: How many positions the prompt's own forward reads.
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
        self.positions = self._span.positions

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
