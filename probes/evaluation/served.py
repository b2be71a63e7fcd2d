"""A guard evaluated as it serves: the same requests bare and guarded, and what readers got.

Delay and leaks are those of the deployment: trips come from its traces, and leaked tokens are
harmful words in the text that was released at its hold-back, a supplied prefill excepted.

Knows both arms and how they are counted. Does not know where requests come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probes.evaluation.released_text import Reading, ReleasedReading
from probes.metrics.detection import Delay, delay_from
from probes.metrics.intervals import Proportion
from probes.rollouts.types import Request
from probes.runs.progress import progress
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.engines.transformers.output import GuardedOutput
from safe_decode.prompts.chat import text_ids
from safe_decode.trace.schema import SafetyTrace

__all__ = ["ServedAnswer", "SituationFigures", "answer_both", "delay_as_served", "figures_by"]


@dataclass(frozen=True)
class ServedAnswer:
    """One request in both arms.

    Attributes:
        request: What was asked.
        bare: What the bare model's text is.
        bare_onset: Token of its first harmful clause, counted from the turn's start; or None.
        guarded: What the released text is.
        leaked_tokens: Released tokens from the onset of harm on.
        trace: Of the guarded arm.
    """

    request: Request
    bare: ReleasedReading
    bare_onset: int | None
    guarded: ReleasedReading
    leaked_tokens: int
    trace: SafetyTrace


@dataclass(frozen=True)
class SituationFigures:
    """What happened to requests of one kind.

    Attributes:
        name: Of the kind.
        harmful_bare: Bare answers that are harmful.
        harmful_released: Released texts that are.
        tripped: Among all.
        refused_bare: Bare answers that refuse.
        refused_guarded: Released texts that refuse.
        over_refused: Among answers that are benign bare: refused or cut under the guard.
        leaked_mean: Leaked tokens, over answers that are harmful bare; NaN of none.
        leaked_most: The largest number of leaked tokens among the same answers; 0 of none.
    """

    name: str
    harmful_bare: Proportion
    harmful_released: Proportion
    tripped: Proportion
    refused_bare: Proportion
    refused_guarded: Proportion
    over_refused: Proportion
    leaked_mean: float
    leaked_most: int


def answer_both(
    decoder: SafeDecoder,
    requests: Sequence[Request],
    read: Reading,
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
) -> list[ServedAnswer]:
    """Answer every request greedily, with the guard disabled and with it.

    Args:
        decoder: As deployed.
        requests: In any order; rows of like length run together.
        read: Of released text.
        max_new_tokens: Cap; None: the certified one.
        batch_size: Rows run together.

    Returns:
        In the order of `requests`.
    """
    cap = max_new_tokens or decoder.certificate.envelope.max_new_tokens
    order = sorted(range(len(requests)), key=lambda row: _length(requests[row]))
    found: dict[int, ServedAnswer] = {}
    with progress("answering, bare and guarded", len(order)) as advance:
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            batch = [requests[row] for row in part]
            bare = _run(decoder, batch, cap, redirect="flag")
            guarded = _run(decoder, batch, cap)
            for place, row in enumerate(part):
                found[row] = _answered(
                    decoder,
                    requests[row],
                    bare.texts[place],
                    guarded.texts[place],
                    guarded.traces[place],
                    read,
                )
            advance(len(part))
    return [found[row] for row in range(len(requests))]


def figures_by(
    answered: Sequence[ServedAnswer], name_of: Callable[[Request], str]
) -> list[SituationFigures]:
    """Count by kind of request, in order of name."""
    names = sorted({name_of(one.request) for one in answered})
    return [
        _figures(name, [one for one in answered if name_of(one.request) == name]) for name in names
    ]


def delay_as_served(answered: Sequence[ServedAnswer]) -> Delay | None:
    """Measure the delay of answers that are harmful bare; None without any.

    Until its trip a guarded row is the bare one, so the bare text tells the onset.
    """
    known = [
        (one, one.bare_onset)
        for one in answered
        if one.bare.label == "harmful" and one.bare_onset is not None
    ]
    if not known:
        return None
    delays = [
        math.inf if one.trace.end.trip_step is None else one.trace.end.trip_step - 1 - onset
        for one, onset in known
    ]
    leaked = [one.leaked_tokens for one, _ in known]
    return delay_from(np.asarray(delays, float), np.asarray(leaked, float))


def _run(decoder: SafeDecoder, batch: Sequence[Request], cap: int, **options: Any) -> GuardedOutput:  # noqa: ANN401 - those of generate
    return decoder.generate(
        [list(request.messages) for request in batch],
        prefill=[request.prefill for request in batch],
        max_new_tokens=cap,
        do_sample=False,
        **options,
    )


def _answered(
    decoder: SafeDecoder,
    request: Request,
    bare: str,
    guarded: str,
    trace: SafetyTrace,
    read: Reading,
) -> ServedAnswer:
    given = request.prefill or ""
    said, released = read(request.messages, given, bare), read(request.messages, given, guarded)
    onset = None
    if said.onset_char is not None:
        before = text_ids(decoder.tokenizer, bare[: said.onset_char].rstrip(" "))
        onset = trace.end.prefill_tokens + len(before)
    return ServedAnswer(
        request, said, onset, released, _leaked(decoder, guarded, released.onset_char), trace
    )


def _leaked(decoder: SafeDecoder, text: str, onset: int | None) -> int:
    """Count the model's tokens from the onset up to the guard's own words."""
    if onset is None:
        return 0
    ends = [text.find(own, onset) for own in (decoder.refusal, decoder.opener)]
    end = min((place for place in ends if place >= 0), default=len(text))
    return len(text_ids(decoder.tokenizer, text[onset:end])) if end > onset else 0


def _figures(name: str, rows: Sequence[ServedAnswer]) -> SituationFigures:
    n = len(rows)
    benign = [row for row in rows if row.bare.label == "benign"]
    harmful = [row for row in rows if row.bare.label == "harmful"]
    leaked = [row.leaked_tokens for row in harmful]

    def share(is_so: Callable[[ServedAnswer], bool]) -> Proportion:
        return Proportion.of(sum(map(is_so, rows)), n)

    return SituationFigures(
        name=name,
        harmful_bare=Proportion.of(len(harmful), n),
        harmful_released=share(lambda row: row.guarded.label == "harmful"),
        tripped=share(lambda row: row.trace.tripped),
        refused_bare=share(lambda row: row.bare.label == "refusal"),
        refused_guarded=share(lambda row: row.guarded.label == "refusal"),
        over_refused=Proportion.of(sum(row.trace.tripped for row in benign), len(benign)),
        leaked_mean=float(np.mean(leaked)) if leaked else math.nan,
        leaked_most=max(leaked, default=0),
    )


def _length(request: Request) -> int:
    said = sum(len(message["content"]) for message in request.messages)
    return said + len(request.prefill or "")
