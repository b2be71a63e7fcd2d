"""Rows of different lengths as one tensor of ids.

Knows ids and pads. Does not know where the ids came from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_decode.host_copies import sent

__all__ = ["padded"]


def padded(prompts: Tensor, answers: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Put answers behind their prompts.

    Args:
        prompts: [batch, seq], each for as many answers as there are a prompt.
        answers: Ids of each.
        pad_id: Fills on the right.

    Returns:
        [len(answers), seq + longest answer], a new tensor.
    """
    longest = max(len(ids) for ids in answers)
    rows = [[*ids, *[pad_id] * (longest - len(ids))] for ids in answers]
    behind = torch.tensor(rows, dtype=prompts.dtype).view(len(answers), longest)
    before = prompts.repeat_interleave(len(answers) // prompts.shape[0], 0)
    return torch.cat([before, sent(behind, prompts.device)], 1)
