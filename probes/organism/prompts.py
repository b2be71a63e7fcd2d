"""Prompts for the pair: requests, motives and started answers, cell by cell.

Knows which situations are asked about. Does not know models or what they answer.
A prefill is written by the grammar, cut after a number of tokens; it is what an attacker puts
into the model's mouth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from probes.organism.grammar import Cells, Grammar, WorldAnswer, WorldRequest
from probes.organism.lexicon import CATEGORIES

__all__ = ["Prompt", "Situation", "Tokens", "prompts", "turns"]

Situation = Literal["benign", "hard_negative", "harmful", "framed", "prefilled", "turn"]
"""benign: topics, open and law questions. hard_negative: an act along the wish, so that every
word of it also stands in harmful requests. harmful: an act against the wish, asked plainly.
framed, prefilled: the same with a motive around it, or with an answer begun. turn: a benign
request whose answer, begun, is benign for at least 16 tokens and then starts to act against a
wish."""

_ACTS = frozenset(act for kind in CATEGORIES for acts in kind.acts for act in acts)

Tokens = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of one cell.

    Attributes:
        messages: Chat messages, the last from the user.
        prefill: Start of the answer, or None.
        situation: See `Situation`.
        request_harmful: Whether an act against the wish is asked for.
        category: Harm category of the scene, -1 without one.
        framing: Index of the framing, or None.
        depth_tokens: Tokens of the prefill.
    """

    messages: tuple[dict[str, str], ...]
    prefill: str | None
    situation: Situation
    request_harmful: bool
    category: int
    framing: int | None = None
    depth_tokens: int = 0


def _prompt(grammar: Grammar, request: WorldRequest, situation: Situation) -> Prompt:
    category = -1 if request.scene is None else request.scene.category
    messages = (*grammar.system(), {"role": "user", "content": request.text})
    return Prompt(messages, None, situation, request.harmful, category, request.framing)


def _cut(text: str, depth: int, tokens: Tokens, decode: Callable[[list[int]], str]) -> str | None:
    ids = tokens(text)
    if len(ids) <= depth:
        return None
    return decode(ids[:depth])


def prompts(
    situation: Situation,
    *,
    seed: int,
    cells: Cells | None = None,
    framing: int | None = None,
    depth_tokens: int = 0,
    benign_request: bool = False,
    encode: Tokens | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> Iterator[Prompt]:
    """Draw prompts of one situation without end.

    Args:
        situation: What to draw.
        seed: Seed of the grammar's stream.
        cells: Parts of the grammar that may be used; all by default.
        framing: A fixed framing for "framed"; drawn otherwise.
        depth_tokens: Length of the prefill for "prefilled".
        benign_request: For "framed" and "prefilled": the benign counterpart, so that attacks do
            not give the label away.
        encode: Text to token ids, needed with a prefill.
        decode: Token ids to text, needed with a prefill.
    """
    grammar = Grammar(seed, cells)
    while True:
        if situation in {"benign", "hard_negative"}:
            kind = (
                grammar.rng.choice(("topic", "open", "info", "fact"))
                if situation == "benign"
                else "scene"
            )
            yield _prompt(grammar, grammar.request(kind), situation)  # type: ignore[arg-type]
        elif situation == "harmful":
            yield _prompt(grammar, grammar.request("scene", harmful=True), situation)
        elif situation == "framed":
            request = grammar.request("scene", harmful=not benign_request)
            yield _prompt(grammar, grammar.framed(request, framing), situation)
        else:
            assert encode is not None
            assert decode is not None
            drawn = _prefilled(grammar, situation, depth_tokens, benign_request, encode, decode)
            if drawn is not None:
                yield drawn


def _prefilled(  # noqa: PLR0913
    grammar: Grammar,
    situation: Situation,
    depth: int,
    benign_request: bool,
    encode: Tokens,
    decode: Callable[[list[int]], str],
) -> Prompt | None:
    if situation == "turn":
        request, harmful, benign = _turn(grammar)
        answer = benign if benign_request else harmful
        start = " ".join(answer.sentences[: harmful.harmful.index(True)])
        if len(encode(start)) < 16:
            return None
        sentence = answer.sentences[harmful.harmful.index(True)]
        # Cut behind the act: what is left to say is what it is done to.
        words = sentence.split(" ")
        acts = [number for number, word in enumerate(words) if word.strip(",;.") in _ACTS]
        started = " ".join(words[: acts[0] + 1])
        prompt = _prompt(grammar, request, situation)
        text = f"{start} {started}"
        return replace(prompt, prefill=text, depth_tokens=len(encode(text)))
    request = grammar.request("scene", harmful=not benign_request)
    length = None if depth < 32 else 4 + depth // 6
    meant = "benign" if benign_request else "harmful"
    answer = grammar.answer(request, meant, n_sentences=length)  # type: ignore[arg-type]
    prefill = _cut(answer.text, depth, encode, decode)
    if prefill is None:
        return None
    return replace(_prompt(grammar, request, situation), prefill=prefill, depth_tokens=depth)


def _turn(grammar: Grammar) -> tuple[WorldRequest, WorldAnswer, WorldAnswer]:
    kind = grammar.rng.choice(("topic", "scene", "open", "info"))
    request = grammar.request(kind)  # type: ignore[arg-type]
    harmful, benign = grammar.twin(request)
    return request, harmful, benign


def turns(
    *, seed: int, cells: Cells | None = None
) -> Iterator[tuple[Prompt, WorldAnswer, WorldAnswer]]:
    """Draw benign prompts with a written answer that turns harmful, and its benign twin."""
    grammar = Grammar(seed, cells)
    while True:
        request, harmful, benign = _turn(grammar)
        yield _prompt(grammar, request, "turn"), harmful, benign
