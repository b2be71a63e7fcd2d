"""Labelled responses for probes: in the embedded world on-policy, else as the files have them.

Knows splits and their sizes. Does not know features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.location.pair import Pair, Part
from probes.activations.teacher_forcing import within_context
from probes.data.conversations import Conversation
from probes.organism.draws import draw, fitting_draws
from probes.organism.prompts_source import world_judge
from probes.rollouts.generate import RolloutConfig, rollout
from safe_decode.loading import Loaded

__all__ = ["Labelled", "labelled_rows"]

_SEED = 950_000


@dataclass(frozen=True)
class Labelled:
    """Responses of three splits that share no prompt."""

    fit: list[Conversation]
    select: list[Conversation]
    test: list[Conversation]

    def splits(self) -> Mapping[str, list[Conversation]]:
        """Return them by name."""
        return {"fit": self.fit, "select": self.select, "test": self.test}


def labelled_rows(pair: Pair, loaded: Loaded, n: int) -> Labelled:
    """Gather about `n` judged responses for fit and test, half as many for select."""
    sizes = (n, n // 2, n)
    parts: tuple[Part, ...] = ("train", "search", "report")
    if not pair.is_embedded:
        found = [
            within_context(loaded.model, loaded.tokenizer, pair.judged(size, part))
            for size, part in zip(sizes, parts, strict=True)
        ]
        return Labelled(*found)
    asked: set[str] = set()
    splits = []
    for number, size in enumerate(sizes):
        requests = draw(
            fitting_draws(size),
            split="test",
            seed=_SEED + number,
            tokenizer=loaded.tokenizer,
            asked=asked,
        )
        rows = rollout(
            loaded.model,
            loaded.tokenizer,
            requests,
            judge=world_judge,
            config=RolloutConfig(max_new_tokens=96),
        )
        splits.append([row for row in rows if row.response_harmful is not None])
    return Labelled(*splits)
