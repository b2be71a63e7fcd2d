"""Requests whose answer somebody else has begun, at length.

*filler*: openers that comply, the wish told again, idle steps. *content*: acts, against the wish
where the request is harmful and along it where it is not.

Knows which beginnings there are, and how many of each a probe is fitted and certified on. Does not
know models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Literal

from probes.data.conversations import Split
from probes.organism.grammar import Cells, Grammar
from probes.rollouts.types import Request
from safe_decode.certificate_choice import BEGUN
from safe_decode.typing import Tokenizer

__all__ = ["KINDS", "LONG_TOKENS", "Kind", "begun", "long_requests"]

Kind = Literal["filler", "content"]
KINDS: tuple[Kind, ...] = ("content", "filler")
_SENTENCES = 90
"""More than 500 tokens of any sentences."""
LONG_TOKENS = 500
_DEPTHS = (128, 256, LONG_TOKENS)
"""Tokens of the beginnings that are fitted on; certified is the longest alone, which counts most:
a response trips by its largest score."""


def begun(
    kind: Kind,
    *,
    harmful: bool,
    seed: int,
    depth: int,
    cells: Cells,
    tokenizer: Tokenizer,
) -> Iterator[Request]:
    """Draw requests with a long beginning of the answer, without end.

    Args:
        kind: What it says.
        harmful: The request, and with *content* the beginning too.
        seed: Of the grammar.
        depth: Tokens of the beginning.
        cells: Parts of the grammar that may be used.
        tokenizer: Counts them.
    """
    grammar = Grammar(seed, cells)
    while True:
        request = grammar.request("scene", harmful=harmful)
        if kind == "filler":
            text = grammar.filler(request, _SENTENCES).text
        else:
            meant: Literal["harmful", "benign"] = "harmful" if harmful else "benign"
            text = grammar.answer(request, meant, n_sentences=_SENTENCES).text
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) <= depth:
            continue
        asked = request.text
        yield Request(
            messages=({"role": "user", "content": asked},),
            group=hashlib.blake2b(f"{asked}{text}".encode(), digest_size=8).hexdigest(),
            prefill=tokenizer.decode(ids[:depth]),
            prompt_harmful=harmful,
        )


def long_requests(
    tokenizer: Tokenizer,
    count: int,
    *,
    split: Split,
    seed: int,
    cells: Cells,
    asked: set[str],
) -> list[Request]:
    """Draw about `count` of them for one split, half harmful; for calibrate, harmless ones alone.

    Args:
        tokenizer: Counts tokens of the beginnings.
        count: How many.
        split: Where the responses belong.
        seed: Of the grammar's streams.
        cells: Parts of the grammar that may be used.
        asked: Groups already used elsewhere, which are passed over; those drawn are added.
    """
    harms = (False,) if split == "calibrate" else (False, True)
    depths = _DEPTHS[-1:] if split == "calibrate" else _DEPTHS
    kinds = [(kind, harm, depth) for kind in KINDS for harm in harms for depth in depths]
    drawn: list[Request] = []
    for number, (kind, harm, depth) in enumerate(kinds):
        source = begun(
            kind,
            harmful=harm,
            seed=seed * 101 + number,
            depth=depth,
            cells=cells,
            tokenizer=tokenizer,
        )
        new = (one for one in source if one.group not in asked)
        for one in islice(new, count // len(kinds)):
            asked.add(one.group)
            meta = {"population": "harmful-request-refused" if harm else BEGUN, "depth": depth}
            drawn.append(replace(one, split=split, meta=meta))
    return drawn
