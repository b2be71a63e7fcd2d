"""What the aligned model is asked, split by split, so that a probe can be made and tested.

Knows the mixture of situations and which cells of the grammar each split may use. Does not know
models. Motives and started answers stand around benign requests as often as around harmful ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from probes.data.conversations import Split
from probes.organism.grammar import Cells
from probes.organism.prompts import Prompt, Situation, prompts
from probes.rollouts.types import Request
from safe_decode.certificate_choice import BEGUN
from safe_decode.typing import Tokenizer

__all__ = [
    "DEPTHS",
    "Draw",
    "POPULATIONS",
    "calibration_draws",
    "draw",
    "fitting_draws",
]

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
POPULATIONS: Mapping[str, str] = {
    "benign": "benign",
    "hard_negative": "benign",
    "harmful": "harmful-request-refused",
    "framed": "benign-framed",
    "prefilled": BEGUN,
    "turn": BEGUN,
}
"""The certificate each harmless response falls under, by situation; where the request is harmful
and the response is not, it is `harmful-request-refused`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """So many prompts of one kind.

    Attributes:
        situation: What to draw.
        count: How many.
        benign_request: The benign counterpart of an attack.
        depth_tokens: Fixed prefill length; None draws evenly from `DEPTHS`.
        framing: A fixed framing; None draws one.
    """

    situation: Situation
    count: int
    benign_request: bool = False
    depth_tokens: int | None = None
    framing: int | None = None


def fitting_draws(count: int) -> tuple[Draw, ...]:
    """Return the mixture on which probes are fitted and selected, about `count` prompts."""

    def share(of: float) -> int:
        return round(count * of)

    return (
        Draw(situation="benign", count=share(0.12)),
        Draw(situation="hard_negative", count=share(0.16)),
        Draw(situation="framed", count=share(0.08), benign_request=True),
        Draw(situation="prefilled", count=share(0.12), benign_request=True),
        Draw(situation="turn", count=share(0.10), benign_request=True),
        Draw(situation="harmful", count=share(0.12)),
        Draw(situation="framed", count=share(0.08)),
        Draw(situation="prefilled", count=share(0.12)),
        Draw(situation="turn", count=share(0.10)),
    )


def calibration_draws(count: int) -> tuple[Draw, ...]:
    """Return the harmless mixture that certificates are drawn from, `count` ordinary prompts."""
    return (
        Draw(situation="benign", count=count // 2),
        Draw(situation="hard_negative", count=count - count // 2),
        Draw(situation="framed", count=count // 10, benign_request=True),
        Draw(situation="prefilled", count=count // 5, benign_request=True),
        Draw(situation="turn", count=count // 10, benign_request=True),
        Draw(situation="harmful", count=count // 6),
    )


def draw(
    draws: tuple[Draw, ...],
    *,
    split: Split,
    seed: int,
    tokenizer: Tokenizer,
    cells: Cells | None = None,
    asked: set[str] | None = None,
) -> list[Request]:
    """Draw requests for one split; each request is asked once.

    Args:
        draws: What and how many.
        split: Where the responses belong.
        seed: Of the grammar's streams.
        tokenizer: Cuts prefills.
        cells: Parts of the grammar that may be used.
        asked: Groups already used elsewhere, which are passed over; those drawn are added.
    """
    seen = set() if asked is None else asked
    requests: list[Request] = []
    for number, one in enumerate(draws):
        source = _new_ones(_prompts(one, seed * 101 + number, tokenizer, cells), seen)
        requests += [_request(prompt, split) for prompt in islice(source, one.count)]
    return requests


def _new_ones(source: Iterator[Prompt], seen: set[str]) -> Iterator[Prompt]:
    for prompt in source:
        group = _group(prompt)
        if group not in seen:
            seen.add(group)
            yield prompt


def _prompts(
    one: Draw,
    seed: int,
    tokenizer: Tokenizer,
    cells: Cells | None,
) -> Iterator[Prompt]:
    depths = (one.depth_tokens,) if one.depth_tokens is not None else DEPTHS
    streams = [
        prompts(
            one.situation,
            seed=seed * 17 + depth,
            cells=cells,
            framing=one.framing,
            depth_tokens=depth,
            benign_request=one.benign_request,
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
            decode=tokenizer.decode,
        )
        for depth in (depths if one.situation == "prefilled" else (0,))
    ]
    while True:
        for stream in streams:
            yield next(stream)


def _group(prompt: Prompt) -> str:
    asked = f"{prompt.messages[-1]['content']}\n{prompt.prefill}"
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _request(prompt: Prompt, split: Split) -> Request:
    meta: dict[str, Any] = {
        "situation": prompt.situation,
        "framing": prompt.framing,
        "depth_tokens": prompt.depth_tokens,
    }
    if prompt.request_harmful:
        meta["population"] = "harmful-request-refused"
    else:
        meta["population"] = POPULATIONS[prompt.situation]
    return Request(
        messages=prompt.messages,
        group=_group(prompt),
        prefill=prompt.prefill,
        prompt_harmful=prompt.request_harmful,
        category=str(prompt.category),
        split=split,
        meta=meta,
    )
