"""Thresholds of their own for marked spans of reasoning.

Every score of a calibration response lies inside a span or outside; the two maxima are
certified apart, each with half of the confidence. A response without a span has no maximum
inside, and counts as one that never alarms there.

Knows responses as ids and their statistics. Does not know how marks are told from text; that
is `safe_decode.policy.reasoning`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from probes.activations.harvest import score_responses
from probes.activations.teacher_forcing import encode_response
from probes.calibration.certify import certify
from probes.calibration.reach import Responses
from probes.calibration.statistic import smoothed_paths
from probes.data.conversations import Conversation
from safe_decode.bundle.bundle import Fingerprint, ProbeBundle
from safe_decode.certificate import Certificate
from safe_decode.errors import CertificateError, DataError
from safe_decode.policy.reasoning import ReasoningSpans, SpanMarks
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["add_reasoning", "maxima_apart"]

NO_SCORE = float(np.finfo(np.float32).min)
"""The maximum over no score: no threshold lies below it."""


def maxima_apart(
    paths: Sequence[NDArray[np.float32]], inside: Sequence[Sequence[bool]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Take each response's largest value inside and outside of its spans, [n] each.

    Args:
        paths: [T + 1] smoothed statistic.
        inside: [T + 1] whether each score lies in a span.
    """
    apart: tuple[list[float], list[float]] = ([], [])
    for path, phases in zip(paths, inside, strict=True):
        mask = np.asarray(phases, dtype=bool)
        for values, mine in zip(apart, (path[mask], path[~mask]), strict=True):
            values.append(float(mine.max()) if len(mine) else NO_SCORE)
    return np.asarray(apart[0], np.float64), np.asarray(apart[1], np.float64)


def add_reasoning(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    bundle: ProbeBundle,
    *,
    opens: str,
    closes: str,
    delta: float = 0.05,
) -> ProbeBundle:
    """Certify a bundle's levels anew, inside and outside of reasoning.

    Only the population "benign" in the model's number format is kept: other certificates speak of
    whole responses.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        conversations: Harmless responses of *calibrate*, with their marks.
        bundle: Made for the model; everything but its certificates stays.
        opens: The opening mark.
        closes: The closing mark.
        delta: Chance that any of the bounds does not hold.

    Raises:
        DataError: A response is harmful or not judged.
        CertificateError: Too few responses, or too few of them reason, for a level.
    """
    _require_harmless(conversations)
    # In other numbers nothing is measured apart, inside and outside of reasoning.
    bundle = bundle.only_as(Fingerprint.of(model, tokenizer))
    marks = ReasoningSpans(opens, closes, bundle.certificates).marks(tokenizer)
    device = next(model.parameters()).device
    logits = score_responses(model, tokenizer, conversations, bundle.probe.to(device))
    paths = smoothed_paths(logits, bundle.monitor)
    within, without = maxima_apart(paths, _phases(tokenizer, conversations, marks))
    groups = [row.group for row in conversations]
    alphas = [c.alpha for c in bundle.certificates if c.population == "benign"]
    envelope = bundle.certificate().envelope
    reaches = Responses.scored(model, logits).reaches(conversations, envelope)

    def certified(tops: NDArray[np.float64]) -> tuple[Certificate, ...]:
        return certify(
            tops,
            groups,
            population="benign",
            alphas=alphas,
            delta=delta / 2,
            envelope=envelope,
            reaches=reaches,
        )

    reasoning = certified(within)
    _require_thresholds(reasoning, len(groups))
    return replace(
        bundle,
        certificates=certified(without),
        reasoning=ReasoningSpans(opens, closes, reasoning),
    )


def _require_harmless(conversations: Sequence[Conversation]) -> None:
    if any(row.response_harmful is not False for row in conversations):
        raise DataError(
            "a response is harmful or not judged; thresholds are calibrated on responses judged "
            "harmless."
        )


def _require_thresholds(reasoning: Sequence[Certificate], n: int) -> None:
    bare = [c.alpha for c in reasoning if c.threshold == NO_SCORE]
    if bare:
        raise CertificateError(
            f"alpha={bare[0]:g} has no threshold inside reasoning: too few of the {n} responses "
            "hold a span; add responses that reason."
        )


def _phases(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    marks: SpanMarks,
) -> list[list[bool]]:
    """Say of each score of each response whether it lies inside reasoning."""
    encoded = [encode_response(tokenizer, row) for row in conversations]
    return [
        # The model's own words, with no prefill; a shift cannot matter where nothing is supplied.
        marks.phases(
            one.ids[one.turn_start :],
            marks.turn(one.ids[: one.turn_start], 0, is_chat=True, shift=0.0),
        )
        for one in encoded
    ]
