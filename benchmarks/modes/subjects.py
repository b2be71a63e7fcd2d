"""Who is measured: the embedded model, and a tiny random model of each family.

Knows models, prompts and thresholds that some rows exceed and others do not. Does not know what
is measured. Tiny models and their bundles are those of the tests: random, wide weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from probes.organism.draws import Draw, draw
from probes.organism.grammar import Cells
from probes.rollouts.types import Request
from safe_decode.bench.models import Subject, embedded_subject
from safe_decode.prompts.batch import PromptBatch, from_prompts
from safe_decode.testing.bundles import bundle_for, peaks, threshold_between
from safe_decode.testing.models import FAMILIES, MORE_FAMILIES, byte_tokenizer, tiny_model
from safe_decode.typing import Tokenizer

__all__ = ["EVERY_FAMILY", "CallPrompts", "ModeSubject", "embedded", "requests_of", "tiny"]

EVERY_FAMILY = (*FAMILIES, *MORE_FAMILIES, "mixtral")
_TEXT = "hello what is it? tell me a long story go abc once upon a time and one more"


@dataclass(frozen=True)
class CallPrompts:
    """Prompts of one call.

    Attributes:
        prompts: Texts or conversations.
        prefills: The beginning of each answer.
    """

    prompts: Sequence[Any]
    prefills: Sequence[str | None]

    def of(self, rows: Sequence[int]) -> CallPrompts:
        """Take some rows, in their order."""
        return CallPrompts([self.prompts[i] for i in rows], [self.prefills[i] for i in rows])


@dataclass(frozen=True)
class ModeSubject:
    """A guarded model and what it is asked.

    Attributes:
        subject: Model, tokenizer and bundle.
        asked: Prompts of one batch.
        new_tokens: Cap of a call.
    """

    subject: Subject
    asked: CallPrompts
    new_tokens: int

    @property
    def name(self) -> str:
        """Name the model."""
        return self.subject.name

    def inputs(self, asked: CallPrompts | None = None) -> PromptBatch:
        """Encode prompts as the guard does."""
        own, subject = asked or self.asked, self.subject
        prefills = list(own.prefills)
        return from_prompts(subject.tokenizer, list(own.prompts), prefills, subject.model.device)

    @cached_property
    def middle(self) -> float:
        """A threshold that about half of the rows exceed when generating greedily."""
        flagged = self.subject.decoder(redirect="flag").generate(
            list(self.asked.prompts),
            prefill=list(self.asked.prefills),
            max_new_tokens=self.new_tokens,
            do_sample=False,
        )
        return threshold_between(peaks(flagged))


def tiny(family: str, *, rows: int = 5, new_tokens: int = 24) -> ModeSubject:
    """Make a tiny random model of a family with a random probe."""
    tokenizer, model = byte_tokenizer(), tiny_model(family)
    subject = Subject(f"tiny {family}", model, tokenizer, bundle_for(model, tokenizer))
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 5, (rows,), generator=generator).tolist()
    starts = torch.randint(0, len(_TEXT.split()), (rows,), generator=generator).tolist()
    words = 2 * _TEXT.split()
    prompts = [
        " ".join(words[start : start + n]) + f" {row}"
        for row, (start, n) in enumerate(zip(starts, counts, strict=True))
    ]
    return ModeSubject(subject, CallPrompts(prompts, [None] * rows), new_tokens)


def requests_of(tokenizer: Tokenizer, rows: int, *, seed: int = 8) -> list[Request]:
    """Draw requests of the embedded world, a third each benign, hard negative and prefilled."""
    third = -(-rows // 3)
    kinds = (
        Draw(situation="prefilled", count=third, depth_tokens=16),
        Draw(situation="benign", count=third),
        Draw(situation="hard_negative", count=third),
    )
    pools = [
        draw((kind,), split="test", seed=seed, tokenizer=tokenizer, cells=Cells.unseen(0))
        for kind in kinds
    ]
    return [request for group in zip(*pools, strict=True) for request in group][:rows]


def embedded(*, rows: int = 8, new_tokens: int = 64) -> ModeSubject:
    """Load the embedded model; some of its rows begin with a harmful prefill."""
    subject = embedded_subject()
    requests = requests_of(subject.tokenizer, rows)
    asked = CallPrompts(
        [list(request.messages) for request in requests],
        [request.prefill for request in requests],
    )
    return ModeSubject(subject, asked, new_tokens)
