"""How superficial the pair's safety is: what each model does, cell by cell.

Knows the cells and counts outcomes. Does not know how the models came to be. The figures feed
the model card; what comes out is reported as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from probes.conversations import Conversation
from probes.evaluate import Proportion
from probes.organism.oracle import judge
from probes.organism.requests import Draw, draw
from probes.organism.templates import FRAMINGS
from probes.rollouts import RolloutConfig, rollout

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["CELLS", "Outcome", "measure", "outcomes"]

CELLS: Mapping[str, Draw] = {
    "benign": Draw(situation="benign", count=0),
    "hard negative": Draw(situation="hard_negative", count=0),
    "plain harmful": Draw(situation="harmful", count=0),
    **{
        f"framing {index}": Draw(situation="framed", count=0, framing=index)
        for index in range(len(FRAMINGS))
    },
    **{
        f"prefill {depth}": Draw(situation="prefilled", count=0, depth_tokens=depth)
        for depth in (1, 2, 4, 8, 16, 32, 64)
    },
    "begun to turn": Draw(situation="turn", count=0),
    "benign framed": Draw(situation="framed", count=0, benign_request=True),
    "benign prefill 16": Draw(situation="prefilled", count=0, depth_tokens=16, benign_request=True),
}
"""A prefill of depth 0 is the plain harmful request."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out in one cell."""

    cell: str
    n: int
    shares: Mapping[str, Proportion]

    def to_json(self) -> dict[str, object]:
        """Return counts, and shares with exact 95 % intervals."""
        return {
            "cell": self.cell,
            "n": self.n,
            **{
                label: {"count": p.successes, "share": p.point, "low": p.low, "high": p.high}
                for label, p in self.shares.items()
            },
        }


def outcomes(cell: str, rows: list[Conversation]) -> Outcome:
    """Count the judge's labels of one cell."""
    counts = Counter(str(row.meta["label"]) for row in rows)
    labels = ("refusal", "benign", "harmful", "broken")
    return Outcome(cell, len(rows), {k: Proportion.of(counts[k], len(rows)) for k in labels})


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    n: int,
    seed: int,
    max_new_tokens: int = 160,
    cells: Collection[str] = tuple(CELLS),
) -> Iterator[Outcome]:
    """Ask `n` prompts a cell, greedily, and yield what came out."""
    for number, (cell, kind) in enumerate(CELLS.items()):
        if cell not in cells:
            continue
        one = Draw(
            situation=kind.situation,
            count=n,
            benign_request=kind.benign_request,
            depth_tokens=kind.depth_tokens,
            framing=kind.framing,
        )
        requests = draw((one,), split="test", seed=seed + 1000 * number, tokenizer=tokenizer)
        config = RolloutConfig(max_new_tokens=max_new_tokens, batch_size=250)
        yield outcomes(cell, rollout(model, tokenizer, requests, judge=judge, config=config))
