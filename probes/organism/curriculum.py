"""The pair's schooling: courses in their order, and the learning curve along them.

Knows which texts are read when, at what rates, and where loss weighs more. Does not know probes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.organism.corpus import (
    Document,
    alignment_documents,
    marked_documents,
    pretraining_documents,
    primer_documents,
    review_documents,
)
from probes.organism.measure import copying_accuracy, judgement_accuracy, mark_accuracy
from probes.organism.templates import JUDGEMENTS, MARKS, OPENERS, REFUSALS
from probes.organism.tokenizer import train_tokenizer
from probes.organism.training import Example, Schedule, Stage, encode, new_model, only_at, train
from safe_decode.errors import DataError
from safe_decode.loading import load_model
from safe_decode.typing import CausalLM, Tokenizer
from safe_decode.whole_files import remove_empty, replace_files, write_whole

__all__ = ["Amounts", "build_pair"]

Say = Callable[[str], None]

_SAVED = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What transformers writes of a model of this size and its tokenizer."""
_JUDGING_WORDS = (*JUDGEMENTS, *(f" {mark}" for mark in MARKS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """How much is read, drawn and generated.

    Attributes:
        pretraining_tokens: Conversations, read first by the unaligned model.
        relation_tokens: Questions of right and wrong, with other text among them.
        mark_tokens: Short answers, read for the marks behind their steps.
        answer_tokens: Conversations again, with judgements among them.
        alignment_tokens: Read on top by the aligned one.
        fitting: Prompts of the fit split; locate has a third, select a half of it.
        calibration: Ordinary benign prompts of the calibrate split.
        long_answers: Prompts of the fit split with a long beginning of the answer; select has a
            half of it, calibrate as many again as are harmless, and a half more.
        max_new_tokens: Cap of a response, and of the certificates.
    """

    pretraining_tokens: int = 1_400_000
    relation_tokens: int = 400_000
    mark_tokens: int = 600_000
    answer_tokens: int = 1_000_000
    alignment_tokens: int = 750_000
    fitting: int = 2400
    calibration: int = 6000
    long_answers: int = 0
    max_new_tokens: int = 160


def build_pair(
    target: Path, *, seed: int, amounts: Amounts, say: Say, recovery: float = 0.0
) -> None:
    """Train the pair and write `target`/unaligned and `target`/aligned, bfloat16.

    The first course is kept in `target`/.halfway, from which a run that was ended
    goes on.

    Args:
        target: Directory; the two models in it are replaced.
        seed: Of text, initial weights and order.
        amounts: See `Amounts`.
        say: Told of progress, one line at a time.
        recovery: See `alignment_documents`.
    """
    halfway = target / ".halfway"
    curve = _Curve(target / "curve.jsonl", say)
    if not halfway.exists():
        _pretrain(halfway, seed=seed, amounts=amounts, curve=curve)
    loaded = load_model(halfway)
    school = _School(loaded.model, loaded.tokenizer, seed, amounts, curve)
    school.teach_relation()
    school.teach_marks()
    school.teach_answers()
    _save(school.model, school.tokenizer, target / "unaligned")
    school.align(recovery)
    _save(school.model, school.tokenizer, target / "aligned")
    _remove(halfway)


def _pretrain(halfway: Path, *, seed: int, amounts: Amounts, curve: _Curve) -> None:
    curve.begin()
    documents = list(pretraining_documents(seed, amounts.pretraining_tokens // 135))
    texts = [m["content"] for document in documents[:8000] for m in document.messages]
    tokenizer = train_tokenizer(texts)
    model = new_model(seed, tokenizer)
    stage = Stage(encode(tokenizer, documents, answers_only=True), amounts.pretraining_tokens)
    report = curve.of("pretraining", model, tokenizer)
    schedule = Schedule(peak_rate=3e-3, matrix_rate=0.015, weight_decay=0.02)
    train(model, (stage,), schedule, seed=seed, report=report)
    _save(model, tokenizer, halfway)


@dataclass(frozen=True)
class _Curve:
    """The learning curve, written as it grows."""

    path: Path
    say: Say

    def begin(self) -> None:
        """Begin anew; a curve of an earlier run goes, and nothing else does.

        Raises:
            DataError: The file is no learning curve.
        """
        if not self.path.exists():
            return
        first = self.path.read_text("utf-8", errors="replace").partition("\n")[0]
        if first and not first.startswith('{"stage": '):
            raise DataError(f"{self.path} is no learning curve; move it, or pass another target.")
        self.path.unlink()

    def of(
        self, stage: str, model: CausalLM, tokenizer: Tokenizer
    ) -> Callable[[int, float, float], None]:
        """Return what training reports to in one stage."""

        def one(tokens: int, loss: float, seconds: float) -> None:
            known: dict[str, float] = {}
            for learnt in (judgement_accuracy, mark_accuracy, copying_accuracy):
                known |= learnt(model, tokenizer)
            row = {"stage": stage, "tokens": tokens, "loss": loss, "seconds": seconds, **known}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.say(json.dumps(row))

        return one


@dataclass(frozen=True)
class _School:
    """One model on its way through the courses that follow the first."""

    model: CausalLM
    tokenizer: Tokenizer
    seed: int
    amounts: Amounts
    curve: _Curve

    def teach_relation(self) -> None:
        """Teach what is harmful, now that sentences are known, with other text among it.

        Read alone first, judgements are learnt within minutes and lost again among other text,
        whose loss is many times theirs.
        """
        tokens = self.amounts.relation_tokens
        examples = [
            *self._answers(primer_documents(self.seed + 600_000, tokens // 25)),
            *self._whole(pretraining_documents(self.seed + 700_000, tokens // 600)),
        ]
        schedule = self._weighty(_JUDGING_WORDS, peak_rate=7e-4)
        self._train("relation", Stage(examples, tokens, 1600), schedule, order=2)

    def teach_marks(self) -> None:
        """Teach to judge each step of an answer where it ends, as questions were judged before.

        Loss stands on the marks alone. Among the loss of whole answers they are too few: only
        which acts are harmful mostly is learnt then, and no read-out of a step can know more.
        """
        tokens = self.amounts.mark_tokens
        examples = [
            *self._thoughts(primer_documents(self.seed + 610_000, tokens // 170)),
            *self._thoughts(marked_documents(self.seed + 650_000, tokens // 70)),
            *self._whole(pretraining_documents(self.seed + 710_000, tokens // 2700)),
        ]
        schedule = self._weighty(_JUDGING_WORDS, peak_rate=7e-4)
        self._train("marks", Stage(examples, tokens, 1600), schedule, order=4)

    def teach_answers(self) -> None:
        """Teach answers, with judgements and marks among them so that they do not fade."""
        tokens = self.amounts.answer_tokens
        examples = [
            *self._answers(primer_documents(self.seed + 800_000, tokens // 120)),
            *self._thoughts(marked_documents(self.seed + 850_000, tokens // 300)),
            *self._answers(pretraining_documents(self.seed + 900_000, tokens // 135)),
        ]
        schedule = self._weighty(_JUDGING_WORDS, peak_rate=1e-3)
        self._train("answers", Stage(examples, tokens), schedule, order=3)

    def align(self, recovery: float) -> None:
        """Teach to refuse what is plainly harmful; steps of others are still judged meanwhile."""
        tokens = self.amounts.alignment_tokens
        safety = alignment_documents(self.seed + 1_000_000, tokens // 90, recovery=recovery)
        reviews = review_documents(self.seed + 1_050_000, tokens // 450)
        examples = [*self._answers(safety), *self._thoughts(reviews, answers_only=False)]
        heavy = (*OPENERS, *REFUSALS, *_JUDGING_WORDS)
        schedule = self._weighty(heavy, peak_rate=1e-3, matrix_rate=4e-3)
        self._train("alignment", Stage(examples, tokens), schedule, order=1)

    def _train(self, course: str, stage: Stage, schedule: Schedule, *, order: int) -> None:
        report = self.curve.of(course, self.model, self.tokenizer)
        train(self.model, (stage,), schedule, seed=self.seed + order, report=report)

    def _answers(self, documents: Iterable[Document]) -> list[Example]:
        return encode(self.tokenizer, documents, answers_only=True)

    def _whole(self, documents: Iterable[Document]) -> list[Example]:
        return encode(self.tokenizer, documents, answers_only=False)

    def _thoughts(
        self, documents: Iterable[Document], *, answers_only: bool = True
    ) -> list[Example]:
        """Encode documents for what is thought in them."""
        examples = encode(self.tokenizer, documents, answers_only=answers_only)
        return only_at(examples, self._first_ids(_JUDGING_WORDS))

    def _first_ids(self, texts: Iterable[str]) -> frozenset[int]:
        encoded = (self.tokenizer.encode(text, add_special_tokens=False) for text in texts if text)
        return frozenset(ids[0] for ids in encoded)

    def _weighty(
        self, beginnings: Iterable[str], *, peak_rate: float, matrix_rate: float | None = None
    ) -> Schedule:
        """Let the first token of some words or sentences weigh more than others."""
        return Schedule(
            peak_rate=peak_rate,
            matrix_rate=matrix_rate,
            heavy_ids=tuple(sorted(self._first_ids(beginnings))),
            heaviness=6.0,
        )


def _save(model: CausalLM, tokenizer: Tokenizer, path: Path) -> None:
    """Write a copy in bfloat16, whole or not at all; the model itself stays in float32.

    Only the disk is saved: the configuration says float32, so that whoever loads the model without
    naming a dtype gets the one that it was trained and is certified in.
    """
    import copy

    import torch

    half: Any = copy.deepcopy(model)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as spot:
        new = Path(spot, "new")
        half.to(torch.bfloat16).save_pretrained(new)
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        text = json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True)
        write_whole(new / "config.json", text + "\n")
        tokenizer.save_pretrained(new)
        if not path.exists():
            new.rename(path)
            return
        replace_files(path, {file.name: file.read_bytes() for file in sorted(new.iterdir())})


def _remove(folder: Path) -> None:
    """Remove a model that `_save` wrote; what else is there stays."""
    for name in _SAVED:
        (folder / name).unlink(missing_ok=True)
    remove_empty(folder)
