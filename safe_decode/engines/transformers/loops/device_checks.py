"""Whether scores are finite, asked of a device as cheaply as it allows.

Knows tensors of scores. Does not know rows that count, or what becomes of one that is broken.
"""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["all_finite", "broken", "picked", "top"]


def top(scores: Tensor) -> Tensor:
    """Take each row's largest score, [batch]: NaN and +Inf show in it, and a row without any."""
    return scores.amax(-1)


def picked(scores: Tensor, input_ids: Tensor) -> Tensor:
    """Take the scores [batch] of the ids chosen last, the last column of `input_ids` [batch, seq].

    Greedy picks NaN or Inf where there is any: the picked score tells of the row.
    """
    return scores.gather(1, input_ids[:, -1:]).view(-1)


def broken(values: Tensor) -> Tensor:
    """Say which of `values` [batch] are NaN or Inf, without waiting."""
    return values - values != 0


def all_finite(values: Tensor) -> bool:
    """Say, on the CPU, whether all of a few values are finite.

    A sum is finite if its terms are, but for sums that overflow: whoever asks then looks closer.
    """
    return math.isfinite(sum(values.tolist()))
