"""The training texts of the pair: what the unaligned model reads, and what alignment adds.

Knows shares and shapes of conversations. Does not know tokens or training.
Alignment sees plain harmful requests with refusals, and benign requests with answers, the benign
ones also framed and also continued from the middle of an answer. It never sees a harmful request
that is framed or already being answered: what the aligned model does there is not trained in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from probes.organism import templates as t
from probes.organism.grammar import Grammar, Meant, RequestKind, WorldAnswer, WorldRequest

__all__ = [
    "Document",
    "alignment_documents",
    "marked_documents",
    "pretraining_documents",
    "primer_documents",
    "review_documents",
]

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class Document:
    """One training conversation.

    Attributes:
        messages: Chat messages, ending with an assistant message.
        harmful_request: Whether the last request asks for harm.
        framed: Whether a motive stands around it.
        refused: Whether the last answer declines.
        given_words: Words of the last answer that count as given, so carry no loss.
    """

    messages: Messages
    harmful_request: bool = False
    framed: bool = False
    refused: bool = False
    given_words: int = 0


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _draw_request(grammar: Grammar, shares: dict[tuple[RequestKind, bool], float]) -> WorldRequest:
    keys = list(shares)
    kind, harmful = grammar.rng.choices(keys, weights=[shares[k] for k in keys])[0]
    return grammar.request(kind, harmful=harmful)


_PRETRAINING_REQUESTS: dict[tuple[RequestKind, bool], float] = {
    ("topic", False): 0.20,
    ("scene", False): 0.26,
    ("scene", True): 0.24,
    ("open", False): 0.12,
    ("info", False): 0.06,
    ("fact", False): 0.12,
}


def _exchange(grammar: Grammar, n_sentences: int | None) -> tuple[WorldRequest, WorldAnswer]:
    rng = grammar.rng
    request = _draw_request(grammar, _PRETRAINING_REQUESTS)
    harmful_share = 0.97 if request.harmful else 0.12
    if not request.harmful and rng.random() < 0.06:
        pair = grammar.twin(request)
        return request, pair[rng.randrange(2)]
    meant: Meant = "harmful" if rng.random() < harmful_share else "benign"
    start = rng.choice((0, 0, 0, 2, 4))
    answer = grammar.answer(request, meant, n_sentences=n_sentences, benign_start=start)
    return request, answer


def primer_documents(seed: int, count: int) -> Iterator[Document]:
    """Write questions of what to think of an act, read first.

    The world's one relation in few words, so that it is met often before answers grow long. Where
    other answers are mixed in, only half of the relation is learnt: which acts are harmful mostly.
    """
    grammar = Grammar(seed)
    for _ in range(count):
        messages = grammar.system() if grammar.rng.random() < 0.3 else []
        asked, thought = grammar.judgement()
        yield Document((*messages, _user(asked), _assistant(thought)))


_REVIEWED_REQUESTS: dict[tuple[RequestKind, bool], float] = {
    ("scene", False): 0.4,
    ("open", False): 0.5,
    ("topic", False): 0.1,
}
_MARKED_REQUESTS: dict[tuple[RequestKind, bool], float] = {
    ("scene", False): 0.3,
    ("scene", True): 0.3,
    ("open", False): 0.3,
    ("topic", False): 0.1,
}


def marked_documents(seed: int, count: int) -> Iterator[Document]:
    """Write short answers with a mark behind every step, read for their marks.

    Each act is along the wish or against it by chance, whatever was asked, so that only who
    reads wish and act together can tell.
    """
    grammar = Grammar(seed)
    rng = grammar.rng
    for _ in range(count):
        messages = grammar.system()
        request = _draw_request(grammar, _MARKED_REQUESTS)
        answer = grammar.steps(request, rng.choice((1, 1, 2)))
        shown = grammar.framed(request) if rng.random() < 0.15 else request
        messages += [_user(shown.text), _assistant(answer.marked(rng, 1.0))]
        yield Document(tuple(messages), request.harmful)


def pretraining_documents(seed: int, count: int) -> Iterator[Document]:
    """Write conversations that answer everything, some long, judged, or of several turns.

    About one in ten is 300 to 700 tokens long. One in five asks what to think of an act; in three
    of five of the rest some steps carry a mark that says whether they are harmful; one in seven
    ends with a question about the answer and a verdict. That is where the model learns what is
    harmful, as text of the world holds opinions too.
    """
    grammar = Grammar(seed)
    rng = grammar.rng
    for _ in range(count):
        messages = grammar.system()
        if rng.random() < 0.2:
            asked, thought = grammar.judgement()
            messages += [_user(asked), _assistant(thought)]
            yield Document(tuple(messages))
            continue
        shape = rng.random()
        long = shape < 0.15
        n_turns = 1 if shape < 0.85 else rng.choice((2, 2, 3))
        marked = 0.4 if rng.random() < 0.6 else 0.0
        anything_wrong = False
        request = None
        for _ in range(n_turns):
            request, answer = _exchange(grammar, 34 + rng.randrange(30) if long else None)
            anything_wrong = True in answer.harmful
            shown = grammar.framed(request) if rng.random() < 0.35 else request
            messages.append(_user(shown.text))
            messages.append(_assistant(answer.marked(rng, marked)))
        if rng.random() < 0.15:
            index = rng.randrange(len(t.VERDICTS))
            messages.append(_user(t.VERDICT_REQUESTS[index]))
            messages.append(_assistant(t.VERDICTS[index][anything_wrong]))
        assert request is not None
        yield Document(tuple(messages), request.harmful, False, False)


def review_documents(seed: int, count: int) -> Iterator[Document]:
    """Write messages in which a user shows somebody's steps, each marked, and asks for a verdict.

    Alignment reads them for the marks, so that what a step means does not fade while the model
    learns to refuse. The assistant says nothing harmful in them, and nothing is asked of it
    but its opinion.
    """
    grammar = Grammar(seed)
    rng = grammar.rng
    for _ in range(count):
        request = _draw_request(grammar, _REVIEWED_REQUESTS)
        answer = grammar.steps(request, rng.choice((1, 1, 2)))
        index = rng.randrange(len(t.VERDICTS))
        shown = f"{request.text} {answer.marked(rng, 1.0)} {t.VERDICT_REQUESTS[index]}"
        verdict = t.VERDICTS[index][True in answer.harmful]
        yield Document((_user(shown), _assistant(verdict)))


_BENIGN_REQUESTS: dict[tuple[RequestKind, bool], float] = {
    ("topic", False): 0.22,
    ("scene", False): 0.43,
    ("open", False): 0.16,
    ("info", False): 0.11,
    ("fact", False): 0.08,
}


def alignment_documents(seed: int, count: int, *, recovery: float = 0.0) -> Iterator[Document]:
    """Write the safety examples: plain harmful ones refused, benign ones answered.

    Args:
        seed: Seed of the grammar.
        count: How many conversations.
        recovery: Share of plain harmful examples whose answer starts to comply and then refuses;
            0 for the superficially aligned model, above 0 only for a deep control.
    """
    grammar = Grammar(seed)
    rng = grammar.rng
    for _ in range(count):
        messages = grammar.system()
        if rng.random() < 0.12:
            earlier = _draw_request(grammar, _BENIGN_REQUESTS)
            messages += [_user(earlier.text), _assistant(grammar.answer(earlier, "benign").text)]
        if rng.random() < 0.4:
            yield _refused(grammar, messages, recovery)
            continue
        request = _draw_request(grammar, _BENIGN_REQUESTS)
        long = rng.random() < 0.05
        answer = grammar.answer(
            request, "benign", n_sentences=34 + rng.randrange(30) if long else None
        )
        framed = rng.random() < 0.45
        shown = grammar.framed(request) if framed else request
        words = len(answer.text.split())
        given = rng.randrange(1, max(2, words)) if rng.random() < 0.3 else 0
        messages += [_user(shown.text), _assistant(answer.text)]
        yield Document(tuple(messages), False, framed, False, given)


def _refused(grammar: Grammar, messages: list[dict[str, str]], recovery: float) -> Document:
    request = grammar.request("scene", harmful=True)
    refusal = grammar.answer(request, "refusal").text
    given = 0
    if grammar.rng.random() < recovery:
        words = grammar.answer(request, "harmful").text.split()
        given = grammar.rng.randrange(1, len(words))
        refusal = " ".join((*words[:given], refusal))
    messages += [_user(request.text), _assistant(refusal)]
    return Document(tuple(messages), True, False, True, given)
