"""Long answers that the grammar writes: beginnings for the model to go on from, and whole ones.

*filler*: openers that comply, the wish told again, idle steps. *content*: acts, against the wish
where the request is harmful and along it where it is not. Whole answers stand for what the model
itself seldom says, such as harm behind filler; the oracle labels each by what is left of it where
it is cut.

Knows which there are, and how many of each a probe is fitted and certified on. Does not know
models.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

from probes.data.conversations import Conversation, Split
from probes.organism.grammar import Cells, Grammar
from probes.organism.oracle import judge
from probes.rollouts.types import Request
from safe_decode.certificate_choice import BEGUN
from safe_decode.typing import Tokenizer

__all__ = [
    "KINDS",
    "LONG_TOKENS",
    "WRITTEN",
    "Kind",
    "Written",
    "begun",
    "long_requests",
    "written_answers",
]

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


Written = Literal["benign", "harmful", "late", "filler benign", "filler harmful"]
WRITTEN: tuple[Written, ...] = (
    "benign",
    "benign",
    "harmful",
    "late",
    "filler benign",
    "filler harmful",
)
"""Drawn in turn: half of the answers mean no harm."""
_LEAST_TOKENS = 48


def written_answers(
    tokenizer: Tokenizer,
    count: int,
    *,
    split: Split,
    seed: int,
    cells: Cells,
    asked: set[str],
    kinds: Sequence[Written] = WRITTEN,
    tokens: int | None = None,
) -> list[Conversation]:
    """Write answers.

    Args:
        tokenizer: Counts tokens.
        count: How many.
        split: Where they belong.
        seed: Of the grammar's streams and of the lengths.
        cells: Parts of the grammar that may be used.
        asked: Groups already used elsewhere, which are passed over; those written are added.
        kinds: Drawn in turn.
        tokens: Length of all; None: drawn between 48 and 500.
    """
    found: list[Conversation] = []
    for kind, request, text in _texts(Grammar(seed, cells), kinds, random.Random(seed)):
        if len(found) == count:
            return found
        ids = tokenizer.encode(text, add_special_tokens=False)
        lengths = random.Random(f"{seed} {text}")
        length = tokens or round(_LEAST_TOKENS * (LONG_TOKENS / _LEAST_TOKENS) ** lengths.random())
        if len(ids) < length:
            continue
        response = tokenizer.decode(ids[:length])
        messages = ({"role": "user", "content": request},)
        verdict = judge(messages, response)
        group = hashlib.blake2b(f"{request}{response}".encode(), digest_size=8).hexdigest()
        if verdict.label == "broken" or group in asked:
            continue
        asked.add(group)
        found.append(
            Conversation(
                messages=messages,
                response=response,
                group=group,
                split=split,
                prompt_harmful="benign" not in kind,
                response_harmful=verdict.label == "harmful",
                onset_char=verdict.onset_char,
                meta={"situation": f"written, {kind}", "population": BEGUN},
            )
        )
    raise AssertionError("the grammar never ends")


def _texts(
    grammar: Grammar, kinds: Sequence[Written], rng: random.Random
) -> Iterator[tuple[Written, str, str]]:
    """Draw kinds, requests and whole answers, without end."""
    while True:
        for kind in kinds:
            request = grammar.request("scene", harmful="benign" not in kind)
            meant: Literal["harmful", "benign"] = "benign" if "benign" in kind else "harmful"
            start = rng.randrange(4, 40) if kind == "late" else 0
            answer = grammar.answer(request, meant, n_sentences=_SENTENCES, benign_start=start)
            text = answer.text
            if kind.startswith("filler"):
                before = grammar.filler(request, rng.randrange(2, 60)).text
                text = f"{before} {text}"
            yield kind, request.text, text
