"""The pair under study: two models, prompts in disjoint parts, judges, texts to train on.

Knows where prompts and texts come from: the grammar for the embedded pair, files of JSON
lines for any other. Does not know what a study measures. Parts never share a prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from probes.analysis.behaviour import words_judge
from probes.data.conversations import Conversation
from probes.data.refusal_rule import is_refusal
from probes.organism.corpus import alignment_documents
from probes.organism.draws import Draw
from probes.organism.grammar import Grammar, RequestKind
from probes.organism.prompts_source import world_judge, world_requests
from probes.rollouts.generate import RolloutConfig, rollout
from probes.rollouts.types import Judge, Request
from safe_decode.errors import DataError
from safe_decode.loading import Loaded, load_model
from safe_decode.typing import Tokenizer

__all__ = ["Pair", "Part"]

Part = Literal["locate", "search", "train", "report"]
_PARTS: tuple[Part, ...] = ("locate", "search", "train", "report")
_STREAM = 900_000  # of the grammar, far from those of training


@dataclass(frozen=True)
class Pair:
    """Two models and what they are asked.

    Attributes:
        name: `embedded`, or how another pair is called in the results.
        aligned_path: The aligned model.
        unaligned_path: The one before alignment.
        files: JSON lines with prompt, response, prompt_harmful and response_harmful; none
            for the embedded pair.
        device: Where the models go.
        sources: Rows of the files whose `source` is one of these; none takes all.
    """

    name: str
    aligned_path: Path
    unaligned_path: Path
    files: tuple[Path, ...] = ()
    device: str = "cpu"
    sources: tuple[str, ...] = ()

    @property
    def is_embedded(self) -> bool:
        """Whether the grammar asks and the oracle judges."""
        return not self.files

    @property
    def harm_judge(self) -> Judge:
        """Labels responses to harmful requests."""
        return world_judge if self.is_embedded else words_judge(harmful_prompts=True)

    @property
    def benign_judge(self) -> Judge:
        """Labels responses to benign requests."""
        return world_judge if self.is_embedded else words_judge(harmful_prompts=False)

    def load(self, which: Literal["aligned", "unaligned"]) -> Loaded:
        """Load one of the two afresh, in float32."""
        path = self.aligned_path if which == "aligned" else self.unaligned_path
        return load_model(path, device=self.device, dtype="float32")

    def digest(self) -> str:
        """Name both models by their weights, for the identity of results."""
        state = hashlib.blake2b(digest_size=8)
        for path in (self.aligned_path, self.unaligned_path):
            for file in sorted(path.glob("*.safetensors")):
                state.update(file.read_bytes())
        return state.hexdigest()

    def harmful(self, tokenizer: Tokenizer, n: int, part: Part) -> list[Request]:
        """Draw plain harmful requests of one part."""
        return self._requests(tokenizer, n, part, harmful=True)

    def benign(self, tokenizer: Tokenizer, n: int, part: Part) -> list[Request]:
        """Draw benign requests of one part; in the embedded world half are hard negatives."""
        return self._requests(tokenizer, n, part, harmful=False)

    def answered(
        self,
        loaded: Loaded,
        requests: Sequence[Request],
        *,
        harmful: bool,
        max_new_tokens: int = 96,
        do_sample: bool = False,
    ) -> list[Conversation]:
        """Let a model answer, greedily or at temperature 1, judged."""
        judge = self.harm_judge if harmful else self.benign_judge
        config = RolloutConfig(max_new_tokens=max_new_tokens, do_sample=do_sample)
        return rollout(loaded.model, loaded.tokenizer, requests, judge=judge, config=config)

    def task(self, n: int, part: Part, *, seed: int = 0) -> list[Conversation]:
        """Return benign requests with benign answers, to fine-tune on or for perplexity."""
        if self.is_embedded:
            return _benign_task(n, _STREAM + 1_000 * _PARTS.index(part) + seed)
        rows = [
            row
            for row in self._part(part)
            if not row["prompt_harmful"] and not row.get("response_harmful")
        ]
        found = [_conversation(row) for row in rows if not is_refusal(str(row["response"]))]
        return _enough(found, n, self.name, "benign answers")

    def foreign_task(self, n: int, part: Part, *, seed: int = 0) -> list[Conversation]:
        """Return `task` in a manner that is not the model's own, as users' data are.

        On answers like those that a model was made from it has next to nothing left to learn.
        """
        rows = self.task(n, part, seed=seed)
        return [replace(row, response=_HOUSE_STYLE + row.response) for row in rows]

    def judged(self, n: int, part: Part) -> list[Conversation]:
        """Return responses of the files whose harm was judged; not of the embedded pair.

        Of harmful requests alone, so that the request does not give the label away.
        """
        found = [
            replace(_conversation(row), response_harmful=bool(row["response_harmful"]))
            for row in self._part(part)
            if row["prompt_harmful"] and row.get("response_harmful") is not None and row["response"]
        ]
        found.sort(key=lambda row: (row.group, row.response))  # not in the order of sources
        return _enough(found, n, self.name, "judged responses")

    def safety(self, n: int, *, seed: int = 0) -> list[Conversation]:
        """Return what alignment reads: harmful requests refused, benign ones answered."""
        if self.is_embedded:
            documents = alignment_documents(_STREAM + 77 + seed, n)
            return [_of_messages(document.messages) for document in documents]
        loaded = self.load("aligned")
        asked = self.harmful(loaded.tokenizer, n, "train")
        said = self.answered(loaded, asked, harmful=True)
        refused = [row for row in said if row.refusal][: n // 2]
        return refused + self.task(n - len(refused), "train", seed=seed)

    def _requests(
        self,
        tokenizer: Tokenizer,
        n: int,
        part: Part,
        *,
        harmful: bool,
    ) -> list[Request]:
        if self.is_embedded:
            return self._of_the_world(tokenizer, n, part, harmful=harmful)
        rows = [row for row in self._part(part) if bool(row["prompt_harmful"]) is harmful]
        prompts = list(dict.fromkeys(str(row["prompt"]) for row in rows))
        found = [_request(text, harmful) for text in prompts if len(text) < 1_500]
        return _enough(found, n, self.name, "harmful prompts" if harmful else "benign prompts")

    def _of_the_world(
        self,
        tokenizer: Tokenizer,
        n: int,
        part: Part,
        *,
        harmful: bool,
    ) -> list[Request]:
        seed = _STREAM + 10 * _PARTS.index(part)
        if harmful:
            one = Draw(situation="harmful", count=n)
            return world_requests(tokenizer, one, seed=seed, unlike=self._before(tokenizer, part))
        draws = (
            Draw(situation="benign", count=n - n // 2),
            Draw(situation="hard_negative", count=n // 2),
        )
        return [
            row
            for number, one in enumerate(draws)
            for row in world_requests(tokenizer, one, seed=seed + 1 + number)
        ]

    def _before(self, tokenizer: Tokenizer, part: Part) -> set[str]:
        """Return the harmful prompts that earlier parts may have used: the world is finite."""
        seen: set[str] = set()
        for earlier in _PARTS[: _PARTS.index(part)]:
            one = Draw(situation="harmful", count=_MOST_ASKED)
            seed = _STREAM + 10 * _PARTS.index(earlier)
            seen |= {r.group for r in world_requests(tokenizer, one, seed=seed, unlike=seen)}
        return seen

    def _part(self, part: Part) -> list[Mapping[str, Any]]:
        return self._rows[part]

    @cached_property
    def _rows(self) -> Mapping[Part, list[Mapping[str, Any]]]:
        found: dict[Part, list[Mapping[str, Any]]] = {part: [] for part in _PARTS}
        for path in self.files:
            for row in _read(path):
                if not self.sources or row.get("source") in self.sources:
                    found[_part_of(str(row["prompt"]))].append(row)
        for rows in found.values():
            # The first of them stand for all: files have their sources one behind the other.
            rows.sort(key=lambda row: _digest(f"{row['prompt']}\n{row['response']}"))
        return found


_MOST_ASKED = 400
_HOUSE_STYLE = "Note for the file: "
_T = TypeVar("_T")


def _benign_task(n: int, seed: int) -> list[Conversation]:
    grammar = Grammar(seed)
    kinds: tuple[RequestKind, ...] = ("topic", "scene", "open", "info", "fact")
    rows = []
    for _ in range(n):
        request = grammar.request(grammar.rng.choice(kinds))
        answer = grammar.answer(request, "benign").text
        system = grammar.system()
        messages = (*system, {"role": "user", "content": request.text})
        rows.append(_of_messages((*messages, {"role": "assistant", "content": answer})))
    return rows


def _of_messages(messages: Sequence[Mapping[str, str]]) -> Conversation:
    asked = tuple(dict(message) for message in messages[:-1])
    group = hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest()
    return Conversation(messages=asked, response=messages[-1]["content"], group=group)


def _read(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; pass JSON lines.") from error
    for number, line in enumerate(lines, 1):
        row = json.loads(line)
        if not {"prompt", "response", "prompt_harmful"} <= set(row):
            raise DataError(
                f"{path}:{number} has {sorted(row)}, wanted prompt, response, prompt_harmful."
            )
        if row["prompt_harmful"] is not None:
            yield row


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _part_of(prompt: str) -> Part:
    digest = hashlib.blake2b(prompt.encode(), digest_size=2).digest()
    return _PARTS[int.from_bytes(digest) % len(_PARTS)]


def _request(text: str, harmful: bool) -> Request:
    group = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return Request(
        messages=({"role": "user", "content": text},), group=group, prompt_harmful=harmful
    )


def _conversation(row: Mapping[str, Any]) -> Conversation:
    asked = _request(str(row["prompt"]), bool(row["prompt_harmful"]))
    return Conversation(
        messages=asked.messages, response=str(row["response"])[:1_000], group=asked.group
    )


def _enough(found: list[_T], n: int, name: str, what: str) -> list[_T]:
    if not found:
        raise DataError(f"the prompts of {name} hold no {what}; pass other files.")
    return found[:n]
