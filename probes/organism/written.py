"""Long answers that the grammar writes, for what the model itself seldom says.

Benign and harmful answers of up to 500 tokens; answers that turn harmful late; and filler (openers
that comply, the wish told again, idle steps) with either behind it. The oracle labels each by what
is left of it where it is cut.

Knows the grammar and which kinds there are. Does not know models.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Literal

from probes.data.conversations import Conversation, Split
from probes.organism.grammar import Cells, Grammar
from probes.organism.oracle import judge
from safe_decode.certificate_choice import BEGUN
from safe_decode.typing import Tokenizer

__all__ = ["MOST_TOKENS", "WRITTEN", "Written", "written_answers"]

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
MOST_TOKENS = 500
_SENTENCES = 90
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
        length = tokens or round(_LEAST_TOKENS * (MOST_TOKENS / _LEAST_TOKENS) ** lengths.random())
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
