"""Judged responses of the embedded aligned model, drawn from its own small world.

Controls are fitted and thresholds set on the cells that the bundle may have seen; what is
counted comes from cells that no split has seen.

Knows the mixture, the oracle and the seeds. Does not know probes or figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from probes.data.conversations import Conversation, Split
from probes.organism.draws import calibration_draws, draw, fitting_draws
from probes.organism.grammar import Cells
from probes.organism.oracle import judge
from probes.rollouts.generate import RolloutConfig, rollout
from probes.rollouts.types import Request
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["EmbeddedData", "held_out_requests"]

# Apart from the seeds of the bundle's own splits; each split has its own stream.
_FIRST_SEED = 7_700_000


@dataclass(frozen=True, kw_only=True)
class EmbeddedData:
    """Draws conversations of the embedded model.

    Attributes:
        seed: Of the grammar's streams.
        fold: Which categories are held out of all but the test split.
        max_new_tokens: Cap of a response: the certified one.
    """

    seed: int = 0
    fold: int = 0
    max_new_tokens: int = 160

    def test(self, model: CausalLM, tokenizer: Tokenizer, count: int) -> list[Conversation]:
        """Draw about `count` responses in unseen cells, over all situations."""
        return self._rows(model, tokenizer, "test", held_out_requests(tokenizer, count, self))

    def seen(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        split: Split,
        count: int,
    ) -> list[Conversation]:
        """Draw about `count` responses in seen cells.

        For calibrate these are ordinary ones, and the other populations come with them.
        """
        draws = calibration_draws(count) if split == "calibrate" else fitting_draws(count)
        seed = _FIRST_SEED + 1000 * self.seed + ("fit", "select", "calibrate").index(split)
        requests = draw(
            draws, split=split, seed=seed, tokenizer=tokenizer, cells=Cells.seen(self.fold)
        )
        return self._rows(model, tokenizer, split, requests)

    def apart(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        counts: Mapping[Split, int],
    ) -> dict[Split, list[Conversation]]:
        """Draw splits in seen cells that share no group: the world is small and repeats itself.

        What a later split has in common with an earlier one is left out of the later one.
        """
        taken: set[str] = set()
        parts: dict[Split, list[Conversation]] = {}
        for split, count in counts.items():
            rows = self.seen(model, tokenizer, split, count)
            parts[split] = [row for row in rows if row.group not in taken]
            taken |= {row.group for row in rows}
        return parts

    def _rows(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        split: Split,
        requests: Sequence[Request],
    ) -> list[Conversation]:
        config = RolloutConfig(max_new_tokens=self.max_new_tokens)
        rows = rollout(model, tokenizer, requests, judge=judge, config=config)
        return [replace(row, split=split) for row in rows]


def held_out_requests(tokenizer: Tokenizer, count: int, data: EmbeddedData) -> list[Request]:
    """Draw about `count` requests in unseen cells."""
    return draw(
        fitting_draws(count),
        split="test",
        seed=_FIRST_SEED + 1000 * data.seed + 500,
        tokenizer=tokenizer,
        cells=Cells.unseen(data.fold),
    )
