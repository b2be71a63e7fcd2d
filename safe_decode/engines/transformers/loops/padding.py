"""Rows of different lengths as one tensor of ids.

Knows ids and pads. Does not know where the ids came from.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

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
    width, longest = prompts.shape[1], max(len(ids) for ids in answers)
    whole = prompts.new_full((len(answers), width + longest), pad_id)
    whole[:, :width] = prompts.repeat_interleave(len(answers) // prompts.shape[0], 0)
    for row, ids in enumerate(answers):
        whole[row, width : width + len(ids)] = prompts.new_tensor(ids)
    return whole
