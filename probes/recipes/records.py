"""What a bundle records beside its probe: a canary, and which prompts it was made from.

Knows conversations and a chosen probe. Does not know how it was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from probes.data.conversations import Conversation, Split
from probes.fitting.search import CandidateProbe
from probes.rollouts.framings import ASKED
from safe_decode.bundle.canary import CanaryRecord
from safe_decode.bundle.seen import SeenPrompts
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["canary_of", "seen_prompts"]

# Rounding of other kernels is far below a twentieth of the benign spread, a missing hook or
# another model far above it.
_CANARY_SHARE_OF_SPREAD = 0.05
_SMALLEST_CANARY_TOLERANCE = 1e-3


def seen_prompts(parts: Mapping[Split, Sequence[Conversation]]) -> SeenPrompts:
    """Record prompts as they were asked and, where a framing stands around them, without it."""
    return SeenPrompts.of(
        (text, split)
        for split, rows in parts.items()
        for row in rows
        for text in (row.prompt, str(row.meta.get(ASKED, row.prompt)))
    )


def canary_of(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    best: CandidateProbe,
) -> CanaryRecord:
    """Record the scores of a harmless exchange, to be compared wherever the bundle is loaded."""
    row = next(row for row in rows if row.response_harmful is False and row.response)
    spread = max(best.chosen.monitor.scale)
    return CanaryRecord.of(
        model,
        tokenizer,
        best.fitted.probe.to(next(model.parameters()).device),
        prompt=row.prompt,
        response=row.response,
        tolerance=max(_CANARY_SHARE_OF_SPREAD * spread, _SMALLEST_CANARY_TOLERANCE),
    )
