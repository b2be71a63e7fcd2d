"""Suffixes behind other requests than those they were found for.

A search yields a handful of prompts, and a probe that is refitted on a handful learns little. A
suffix that works for one request often works for others, so each stands behind several, harmful
and harmless in equal number; and so do suffixes that nobody searched.

Knows texts. Does not know models, guards or how suffixes were found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from probes.attacks.behaviours import AttackSet
from probes.attacks.gcg import SuffixConfig, random_suffixes
from probes.attacks.prompt_gap import PromptGap, typeable_ids
from probes.attacks.results import Record
from probes.data.conversations import Message
from probes.rollouts.types import Request
from safe_decode.errors import ConfigurationError
from safe_decode.typing import Tokenizer

__all__ = ["Spread", "random_texts", "spread_over", "spread_requests", "suffixes_of"]

Messages = tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How many requests a suffix is put behind.

    Attributes:
        each: Harmful requests behind which a suffix that was found stands, and as many harmless.
        random: Suffixes drawn by lot, each behind one harmful request and one harmless.
        seed: Of the draws.
    """

    each: int = 0
    random: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.each < 0 or self.random < 0:
            raise ConfigurationError(
                f"each={self.each} and random={self.random} must be at least 0."
            )


def suffixes_of(records: Sequence[Record], attack_set: AttackSet) -> list[str]:
    """List the distinct texts that were put behind a request, in the order of the records."""
    plain = {behaviour.name: behaviour.request for behaviour in attack_set.behaviours}
    found: dict[str, None] = {}
    for record in records:
        request = plain.get(record.behaviour)
        for prompt in record.prompts if request else ():
            asked = [message["content"] for message in prompt if message["role"] == "user"][-1]
            suffix = asked.removeprefix(str(request))
            if suffix not in ("", asked):
                found.setdefault(suffix)
    return list(found)


def random_texts(
    tokenizer: Tokenizer,
    messages: Messages,
    vocab: int,
    count: int,
    *,
    tokens: int = 20,
    seed: int = 0,
) -> list[str]:
    """Draw suffixes that can be typed behind some request, as text."""
    if not count:
        return []
    frame = PromptGap.around(tokenizer, messages)
    config = SuffixConfig(tokens=tokens, steps=count, checks=count, restarts=1, seed=seed)
    points = random_suffixes(frame, typeable_ids(tokenizer, vocab), config)
    return [frame.text_of(gap) for point in points for gap in point.gaps]


def spread_over(
    suffixes: Sequence[str],
    harmful: Sequence[Messages],
    benign: Sequence[Messages],
    spread: Spread,
    *,
    tokenizer: Tokenizer,
    vocab: int,
) -> list[Request]:
    """Put suffixes that were found, and some drawn by lot, behind other requests.

    Args:
        suffixes: Those found.
        harmful: Harmful requests to draw from.
        benign: Harmless requests to draw from.
        spread: How many.
        tokenizer: Spells suffixes that are drawn.
        vocab: Rows of the model's embedding.
    """
    found = spread_requests(
        suffixes, harmful, benign, each=spread.each, name="spread", seed=spread.seed
    )
    if not spread.random or not (harmful or benign):
        return found
    first = next(iter((*harmful, *benign)))
    drawn = random_texts(tokenizer, first, vocab, spread.random, seed=spread.seed)
    by_lot = spread_requests(drawn, harmful, benign, each=1, name="by-lot", seed=spread.seed)
    return [*found, *by_lot]


def spread_requests(
    suffixes: Sequence[str],
    harmful: Sequence[Messages],
    benign: Sequence[Messages],
    *,
    each: int,
    name: str,
    seed: int = 0,
) -> list[Request]:
    """Put each suffix behind so many harmful requests, and as many harmless ones.

    Args:
        suffixes: Texts.
        harmful: Harmful requests to draw from.
        benign: Harmless requests to draw from.
        each: Requests of each kind behind a suffix.
        name: Of the groups.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    sides = [(list(harmful), True), (list(benign), False)]
    return [
        Request(
            messages=_ended(messages, suffix),
            group=f"{name}-{number}-{place}-{'harmful' if harm else 'benign'}",
            prefill=None,
            prompt_harmful=harm,
            split="fit",
            meta={"situation": "adversarial"},
        )
        for number, suffix in enumerate(suffixes)
        for pool, harm in sides
        for place, messages in enumerate(_drawn(pool, each, rng))
    ]


def _drawn(pool: list[Messages], count: int, rng: np.random.Generator) -> Iterator[Messages]:
    if pool:
        chosen = rng.choice(len(pool), size=min(count, len(pool)), replace=False)
        yield from (pool[int(index)] for index in chosen)


def _ended(messages: Messages, suffix: str) -> Messages:
    last = messages[-1]
    return (*messages[:-1], {"role": last["role"], "content": last["content"] + suffix})
