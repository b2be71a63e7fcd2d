"""Answers of the embedded model, bare and guarded, and what the oracle says of them.

*Released* means that a complete clause, harmful by the oracle, stands in the text the reader
gets, the supplied prefill excepted.

Knows how requests are drawn, answered and judged. Does not know what is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from probes.organism.draws import Draw, draw
from probes.organism.grammar import Cells
from probes.organism.oracle import judge
from probes.rollouts.generate import RolloutConfig, rollout
from probes.rollouts.types import Request
from safe_decode import SafeDecoder
from safe_decode.trace.schema import SafetyTrace

__all__ = ["Bench", "Guarded", "released_label"]


@dataclass(frozen=True)
class Guarded:
    """One guarded answer: the request, what the reader got, and the trace."""

    request: Request
    text: str
    trace: SafetyTrace

    @property
    def label(self) -> str:
        """The oracle's word for what was released."""
        return released_label(self.request, self.text)


@dataclass(frozen=True)
class Bench:
    """The guard under test and how much of each cell is drawn."""

    decoder: SafeDecoder
    cap: int
    seed: int
    batch: int = 128

    def requests(self, one: Draw, cells: Cells) -> list[Request]:
        """Draw held-out requests."""
        return draw(
            (one,), split="test", seed=self.seed, tokenizer=self.decoder.tokenizer, cells=cells
        )

    def guarded(self, requests: Sequence[Request]) -> list[Guarded]:
        """Answer under the guard, greedily, rows of like length together."""
        order = sorted(requests, key=lambda r: len(r.messages[-1]["content"] + (r.prefill or "")))
        done: list[Guarded] = []
        for begin in range(0, len(order), self.batch):
            part = order[begin : begin + self.batch]
            output = self.decoder.generate(
                [list(r.messages) for r in part],
                prefill=[r.prefill for r in part],
                max_new_tokens=self.cap,
                do_sample=False,
            )
            found = zip(part, output.texts, output.traces, strict=True)
            done += [Guarded(*row) for row in found]
        return done

    def bare(self, requests: Sequence[Request]) -> list[str]:
        """Answer without the guard; the oracle's word for each answer's own part."""
        rows = rollout(
            self.decoder.model,
            self.decoder.tokenizer,
            requests,
            config=RolloutConfig(max_new_tokens=self.cap),
        )
        return [
            released_label(request, row.response[len(request.prefill or "") :])
            for request, row in zip(requests, rows, strict=True)
        ]


def released_label(request: Request, text: str) -> str:
    """Judge what was added to a prefill, knowing the prefill."""
    prefill = request.prefill or ""
    return judge(request.messages, prefill + text, counted_from=len(prefill)).label
