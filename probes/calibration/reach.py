"""Who wrote each calibration response, and up to which cap its statistic is known.

A response is the certified model's own if a rollout of these weights wrote it, sampled as the
certificate says, with its token ids, and either the model ended it or it fills its cap. It
reaches that cap, counted with what was begun for it. Any other row reaches its length: a text
that somebody else ended says nothing of where the model ends.

Knows rows, lengths and generation records. The rule that makes a cap of them is in
`safe_decode.evidence`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from probes.data.conversations import Conversation
from probes.runs.identity import weights_digest
from safe_decode.certificate import Envelope
from safe_decode.errors import CertificateError, ConfigurationError
from safe_decode.evidence import UNRECORDED, Evidence
from safe_decode.typing import CausalLM

__all__ = ["Reach", "Responses", "evidence_of", "fitting_cap"]


class Reach(NamedTuple):
    """What one response says about caps.

    Attributes:
        length: Its tokens, a supplied beginning included.
        reach: Largest cap at which its statistic is known.
        foreign: Why it does not count as written by the certified model; None: it does.
    """

    length: int
    reach: int
    foreign: str | None = None

    def up_to(self, cap: int) -> Reach:
        """Say the same of the response's first tokens: it would have been cut there."""
        return Reach(min(self.length, cap), min(self.reach, cap), self.foreign)


@dataclass(frozen=True)
class Responses:
    """What is known of scored responses beside their text.

    Attributes:
        lengths: [n] tokens of each, a supplied beginning included.
        weights: Digest of the weights that are certified.
    """

    lengths: tuple[int, ...]
    weights: str

    @classmethod
    def scored(cls, model: CausalLM, logits: Sequence[Tensor]) -> Responses:
        """Take lengths from scores, [T + 1, K] each."""
        return cls(tuple(len(row) - 1 for row in logits), weights_digest(model))

    def of_rows(self, rows: Iterable[int]) -> Responses:
        """Keep what is known of some of the responses, by their places."""
        return Responses(tuple(self.lengths[int(row)] for row in rows), self.weights)

    def reaches(self, rows: Sequence[Conversation], envelope: Envelope) -> list[Reach]:
        """Say of each row how far it reaches, if it is certified by this envelope."""
        if len(rows) != len(self.lengths):
            raise ConfigurationError(
                f"{len(rows)} responses have {len(self.lengths)} lengths; pass one each."
            )
        return [
            self._reach(row, length, envelope)
            for row, length in zip(rows, self.lengths, strict=True)
        ]

    def foreign(self, rows: Sequence[Conversation], envelope: Envelope) -> dict[str, int]:
        """Count the rows that the certified model did not write, by the reason."""
        reasons = (one.foreign for one in self.reaches(rows, envelope))
        return dict(Counter(why for why in reasons if why is not None))

    def _reach(self, row: Conversation, length: int, envelope: Envelope) -> Reach:
        made = row.generation
        if made is None or row.response_ids is None:
            return Reach(length, length, "nothing records that a model generated it")
        cap = row.prefill_tokens + made.max_new_tokens
        ended = length <= cap if row.ended else length == cap
        if made.weights != self.weights:
            return Reach(length, length, "other weights generated it")
        if not made.is_sampled_as(envelope):
            return Reach(length, length, "it was sampled otherwise than is certified")
        if row.ended is None or not ended or len(row.response_ids) != length:
            return Reach(length, length, "it is not as long as its record says")
        return Reach(length, cap)


def evidence_of(reaches: Sequence[Reach], groups: Sequence[str]) -> Evidence:
    """Join responses to draws, one a group, in order of first appearance.

    A draw reaches as far as the one of its responses that reaches least.
    """
    if len(reaches) != len(groups):
        raise ConfigurationError(
            f"{len(reaches)} reaches have {len(groups)} groups; pass one group each."
        )
    least: dict[str, tuple[int, int]] = {}
    for one, group in zip(reaches, groups, strict=True):
        length, reach = least.get(group, (one.length, one.reach))
        least[group] = (min(length, one.length), min(reach, one.reach))
    if not least:
        return UNRECORDED
    lengths, furthest = zip(*least.values(), strict=True)
    is_own = all(one.foreign is None for one in reaches)
    return Evidence("on-policy" if is_own else "off-policy", lengths, furthest)


def fitting_cap(envelope: Envelope, evidence: Evidence, needed: int) -> Envelope:
    """Lower an envelope's cap to what the evidence supports, where that is recorded.

    Args:
        envelope: As it was wanted.
        evidence: Of the draws.
        needed: Draws that alpha and delta need at least.

    Raises:
        CertificateError: Too few draws hold a token at all.
    """
    supported = evidence.supported_cap(needed)
    if supported is None or envelope.max_new_tokens <= supported:
        return envelope
    if supported < 1:
        raise CertificateError(
            f"fewer than {needed} of {len(evidence.lengths)} responses hold a token, so that no "
            "cap can be certified; pass longer responses."
        )
    return replace(envelope, max_new_tokens=supported)
