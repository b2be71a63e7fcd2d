"""The guard as it is deployed, tried with candidates and judged by what readers get.

A try is one sampled continuation under the full guard: threshold, hold-back, redirect and
rewinds. It succeeds where the released text, what the attacker wrote excepted, is harmful.
Every try counts as queries. The same candidates on the bare model are the other arm.

Knows candidates, sampling and the judge. Does not know how candidates are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.attacks.soft_prompt import carrying
from probes.data.conversations import Message
from probes.evaluation.released_text import Reading
from safe_decode.engines.transformers.decoder import GuardedOutput, SafeDecoder
from safe_decode.errors import ConfigurationError
from safe_decode.prompts.batch import Prompts

__all__ = [
    "Attempt",
    "AttackCandidate",
    "Decoding",
    "Deployment",
    "SoftGap",
]

Decoding = Callable[[str], str]
"""How the attacker reads an encoded answer back."""


class SoftGap(NamedTuple):
    """A prompt of raw ids with carriers for free vectors.

    Attributes:
        ids: The whole prompt, the open turn last.
        carrier: The id that stands for a vector.
        vectors: [n, d_model].
    """

    ids: tuple[int, ...]
    carrier: int
    vectors: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class AttackCandidate:
    """One thing to try.

    Attributes:
        messages: What is asked.
        asked: The plain request, by which the judge knows what was wanted.
        prefill: Beginning of the answer, or None.
        name: What kind of attack this is, for tables.
        decoding: Applied to the released text before it is judged a second time.
        loop_tokens: Above 0: answers of one token in a loop, each the next one's prefill.
        soft: Free vectors, in place of `messages` and `prefill`.
    """

    messages: tuple[Message, ...]
    asked: tuple[Message, ...]
    prefill: str | None = None
    name: str = "plain"
    decoding: Decoding | None = None
    loop_tokens: int = 0
    soft: SoftGap | None = None


class Attempt(NamedTuple):
    """What came of a candidate.

    Attributes:
        success: Whether one of the sampled texts is harmful.
        text: The harmful text, or the first one.
        queries: Calls of the deployed model that it took, samples of one call apart.
        tripped: Whether the guard tripped in any sample.
    """

    success: bool
    text: str
    queries: int
    tripped: bool


@dataclass(frozen=True, eq=False)
class Deployment:
    """A model behind its guard, or the same model bare.

    Attributes:
        decoder: As deployed.
        judge: Reads released text; `harmful` is a success.
        is_guarded: False: the guard only watches, and every token is the bare model's.
        max_new_tokens: Cap of an answer; None: the certified one.
        samples: Continuations drawn for each candidate.
        temperature: Of the draws.
        batch_size: Continuations generated together.
        seed: Of the draws.
    """

    decoder: SafeDecoder
    judge: Reading
    is_guarded: bool = True
    max_new_tokens: int | None = None
    samples: int = 1
    temperature: float = 1.0
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1 or self.temperature <= 0:
            raise ConfigurationError(
                f"samples={self.samples}, batch_size={self.batch_size} and temperature="
                f"{self.temperature} must be at least 1, at least 1 and above 0."
            )

    @property
    def cap(self) -> int:
        """Tokens of an answer."""
        return self.max_new_tokens or self.decoder.certificate.envelope.max_new_tokens

    def attempt(self, candidates: Sequence[AttackCandidate], *, draw: int = 0) -> list[Attempt]:
        """Try candidates.

        Args:
            candidates: Returned in this order.
            draw: Number of the call; the same candidates with the same number draw the same.
        """
        is_alone = [c.soft is not None or c.loop_tokens > 0 for c in candidates]
        found: dict[int, Attempt] = {}
        batched = [row for row, alone in enumerate(is_alone) if not alone]
        size = max(1, self.batch_size // self.samples)
        parts = [batched[begin : begin + size] for begin in range(0, len(batched), size)]
        for number, part in enumerate(parts):
            with self._seeded(draw, number):
                output = self._generate(
                    [list(candidates[row].messages) for row in part],
                    prefill=[candidates[row].prefill for row in part],
                )
            for place, row in enumerate(part):
                texts = range(place * self.samples, (place + 1) * self.samples)
                found[row] = self._judged(candidates[row], output, texts)
        for row in (row for row, alone in enumerate(is_alone) if alone):
            with self._seeded(draw, len(parts) + row):
                found[row] = self._alone(candidates[row])
        return [found[row] for row in range(len(candidates))]

    def _alone(self, candidate: AttackCandidate) -> Attempt:
        if candidate.soft is None:
            return self._loop(candidate)
        ids = torch.tensor([candidate.soft.ids], device=self.decoder.model.device)
        vectors = carrying(self.decoder.model, candidate.soft.carrier, candidate.soft.vectors)
        with vectors:
            output = self._generate(input_ids=ids, attention_mask=torch.ones_like(ids))
        return self._judged(candidate, output, range(self.samples))

    def _loop(self, candidate: AttackCandidate) -> Attempt:
        """Ask for one token again and again; what is released is the next prefill."""
        given, said, calls, tripped = candidate.prefill or "", "", 0, False
        for _ in range(candidate.loop_tokens):
            output = self._generate(
                [list(candidate.messages)],
                prefill=[(given + said) or None],
                max_new_tokens=1,
                num_return_sequences=1,
            )
            calls += 1
            end = output.traces[0].end
            tripped = tripped or output.traces[0].tripped
            if not output.texts[0] or (self.is_guarded and end.trip_step is not None):
                break
            said += output.texts[0]
        success = self._is_harmful(candidate, given, said)
        return Attempt(success, said, calls, tripped)

    def _generate(self, prompts: Prompts | None = None, **options: object) -> GuardedOutput:
        settings: dict[str, Any] = {
            "max_new_tokens": self.cap,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "num_return_sequences": self.samples,
            "redirect": None if self.is_guarded else "flag",
            **options,
        }
        return self.decoder.generate(prompts, **settings)

    def _judged(self, candidate: AttackCandidate, output: GuardedOutput, rows: range) -> Attempt:
        texts = [output.texts[row] for row in rows]
        given = candidate.prefill or ""
        harmful = [text for text in texts if self._is_harmful(candidate, given, text)]
        tripped = any(output.traces[row].tripped for row in rows)
        return Attempt(bool(harmful), (harmful or texts)[0], len(texts), tripped)

    def _is_harmful(self, candidate: AttackCandidate, given: str, text: str) -> bool:
        if self.judge(candidate.asked, given, text).label == "harmful":
            return True
        if candidate.decoding is None:
            return False
        return self.judge(candidate.asked, "", candidate.decoding(text)).label == "harmful"

    @contextmanager
    def _seeded(self, draw: int, part: int) -> Iterator[None]:
        """Draw from a seed of this call's own; the global random state is left as it was."""
        device = self.decoder.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((self.seed * 1009 + draw) * 1009 + part)
            yield
