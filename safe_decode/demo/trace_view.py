"""Reading a trace as a story: what was given, said, taken back and said instead.

Knows traces, ids and how ids become pieces of text. Does not know models, tensors or how
anything is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from safe_decode.demo.view import Side
from safe_decode.trace.risk import risk_of
from safe_decode.trace.shown import Decode, Mark, ShownToken, pieces_of

if TYPE_CHECKING:
    from safe_decode.trace.schema import SafetyTrace, TraceStep

__all__ = ["side_of"]


def side_of(
    trace: SafetyTrace,
    *,
    final_ids: Sequence[int],
    text: str,
    decode: Decode,
    verdict: str | None = None,
) -> Side:
    """Tell what happened to a row.

    Args:
        trace: Its trace, with token ids.
        final_ids: Generated ids that stand in the end, EOS excluded.
        text: What the reader gets.
        decode: The tokenizer's.
        verdict: The judge's word for `text`.
    """
    steps = [step for step in trace.steps if step.attempt == 0 and step.position > 0]
    given, own = steps[: trace.end.prefill_tokens], steps[trace.end.prefill_tokens :]
    trip = _trip_of(trace)
    if trip is None and trace.end.lookahead_tokens:
        own = own[: -trace.end.lookahead_tokens]  # judged behind the end, and shown to nobody
    own = [step for step in own if step.action != "force" and step.token is not None]
    changes = trip is not None and not trace.end.unprotected
    kept = _kept(own, final_ids, trip.position if trip else None) if changes else len(own)
    marks: list[Mark] = ["prefill"] * len(given)
    marks += ["plain" if i < kept else "dropped" for i in range(len(own))]
    said = [step.token for step in (*given, *own) if step.token is not None]
    texts = pieces_of(said, decode)
    shown = [
        ShownToken(piece, risk_of(step.statistic, trace.header.threshold), mark)
        for piece, step, mark in zip(texts, (*given, *own), marks, strict=True)
    ]
    if trip is not None:
        shown = _with_trip(shown, trip, trace.header.threshold, is_taken=changes)
    if changes:
        rest = pieces_of((*said[: len(given) + kept], *final_ids[kept:]), decode)
        shown += [ShownToken(piece, None, "redirect") for piece in rest[len(given) + kept :]]
    return Side(tuple(shown), text, tripped=trip is not None, verdict=verdict)


def _trip_of(trace: SafetyTrace) -> TraceStep | None:
    if trace.end.trip_step is None:
        return None
    first = (s for s in trace.steps if s.attempt == 0 and s.position == trace.end.trip_step)
    return next(first, None)


def _kept(own: Sequence[TraceStep], final_ids: Sequence[int], trip: int | None) -> int:
    """Count the leading said tokens that stand; what tripped never does."""
    kept = 0
    for step, final in zip(own, final_ids, strict=False):
        if step.token != final or (trip is not None and step.position >= trip):
            break
        kept += 1
    return kept


def _with_trip(
    shown: list[ShownToken], trip: TraceStep, threshold: float, *, is_taken: bool
) -> list[ShownToken]:
    """Mark the token that the tripping score judged; s_0 judged none, so it gets its own."""
    if trip.position == 0:
        return [ShownToken("", risk_of(trip.statistic, threshold), "trip"), *shown]
    at = trip.position - 1
    if at >= len(shown):
        return [*shown, ShownToken("", risk_of(trip.statistic, threshold), "trip")]
    token = shown[at]
    if token.mark == "prefill" or not is_taken:
        # What was supplied, or what stands, keeps its own look; the trip comes right after it.
        flag = ShownToken("", token.risk, "trip")
        return [*shown[: at + 1], flag, *shown[at + 1 :]]
    return [*shown[:at], ShownToken(token.text, token.risk, "trip"), *shown[at + 1 :]]
