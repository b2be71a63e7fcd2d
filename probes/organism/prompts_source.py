"""The embedded world as a source of prompts with an oracle: what studies and commands ask.

Knows which situations the grammar draws and that its oracle judges them. Does not know
models. Groups that were seen before can be passed over, so that what is reported on is
disjoint from what was located or trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from probes.data.conversations import Split
from probes.evaluation.released_text import ReleasedReading
from probes.organism.draws import Draw, draw
from probes.organism.oracle import judge
from probes.organism.templates import FRAMINGS
from probes.rollouts.types import Judge, Request
from safe_decode.typing import Tokenizer

__all__ = ["WORLD_MOTIVES", "organism_reading", "world_judge", "world_requests"]

WORLD_MOTIVES: tuple[str, ...] = tuple(FRAMINGS)
"""Templates with the slot `{request}`: motives in the words the embedded pair knows."""

world_judge: Judge = judge
"""The oracle: exact in this world, and only there."""


def world_requests(
    tokenizer: Tokenizer,
    one: Draw,
    *,
    seed: int,
    split: Split = "test",
    unlike: Iterable[str] = (),
) -> list[Request]:
    """Draw requests whose groups are not among `unlike`.

    Args:
        tokenizer: Of the embedded pair; cuts prefills.
        one: What and how many.
        seed: Of the grammar's stream.
        split: Written on each request.
        unlike: Groups to pass over.
    """
    return draw((one,), split=split, seed=seed, tokenizer=tokenizer, asked=set(unlike))


def organism_reading(
    messages: Sequence[Mapping[str, str]], prefill: str, released: str
) -> ReleasedReading:
    """Read by the embedded world's oracle, which knows the prefill and does not count it."""
    verdict = judge(messages, prefill + released, counted_from=len(prefill))
    onset = verdict.onset_char
    return ReleasedReading(verdict.label, None if onset is None else max(0, onset - len(prefill)))
