"""What a bundle records of the conversations it was made from.

Knows conversations and splits. Does not know probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from probes.data.conversations import Conversation, Split
from probes.rollouts.framings import ASKED
from safe_decode.bundle.seen import SeenPrompts

__all__ = ["seen_prompts"]


def seen_prompts(parts: Mapping[Split, Sequence[Conversation]]) -> SeenPrompts:
    """Record prompts as they were asked and, where a framing stands around them, without it."""
    return SeenPrompts.of(
        (text, split)
        for split, rows in parts.items()
        for row in rows
        for text in (row.prompt, str(row.meta.get(ASKED, row.prompt)))
    )
