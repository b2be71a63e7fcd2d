"""The canary of a bundle, compared with the scores that an engine has written for it.

Knows a known conversation and slots. Does not know who made the request.
"""

from __future__ import annotations

import torch

from safe_decode.bundle.canary import CanaryRecord
from safe_decode.engines.vllm.rows.row_judge import JudgedRows
from safe_decode.engines.vllm.rows.score_slots import ScoreSlots
from safe_decode.errors import CanaryError

__all__ = ["canary_difference"]


def canary_difference(canary: CanaryRecord, row: JudgedRows, slots: ScoreSlots) -> float:
    """Return the largest difference of a logit.

    Args:
        canary: Of the bundle, in the engine's numbers.
        row: The one row that has read the canary.
        slots: Of the engine.

    Raises:
        CanaryError: The difference is above the tolerance, or a position has no score of its own.
    """
    device, start = row.blocks.device, canary.turn_start - 1
    positions = torch.arange(start, len(canary.ids), device=device)[None]
    tokens = torch.tensor([canary.ids[start:]], device=device)
    is_fresh = torch.zeros_like(positions, dtype=torch.bool)
    found, belongs = slots.read(row.slots(positions), tokens, positions, is_fresh)
    difference = float((found[0].cpu() - canary.logits).abs().amax())
    if not bool(belongs.all()) or not difference <= canary.tolerance:  # NaN is not <= anything
        raise CanaryError(
            f"the canary's scores differ by {difference:.3g}, wanted at most "
            f"{canary.tolerance:.3g}; this engine does not compute what the bundle was made for. "
            "Serve the model with `safe-decode serve`, or make a bundle with this engine."
        )
    return difference
