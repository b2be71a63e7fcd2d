"""One finished row: what it says in the end, and the trace of how it came to that.

Knows records, redirects and the words of the trace. Does not know tensors, hooks
or how a model runs; everything here is built once, after the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from safe_decode.certificate import Certificate
from safe_decode.decision import Action, Reason
from safe_decode.decision import Outcome as OutcomeWord
from safe_decode.errors import (
    BeatError,
    ForcedTokenError,
    GuardError,
    NonFiniteError,
)
from safe_decode.policy.policy import Policy
from safe_decode.policy.redirect import REDIRECTS
from safe_decode.session.records import Redirected, Try
from safe_decode.session.session import RowRecord
from safe_decode.trace.schema import SafetyTrace, TraceEnd, TraceHeader, TraceStep

__all__ = ["BareEnd", "FinishedRow", "LazyTraces", "TraceWriter"]


@dataclass(frozen=True)
class BareEnd:
    """How a row ended in a foreign loop.

    Attributes:
        is_truncated: Whether the refusal did not fit.
        unscored_tail: Tokens that no forward followed.
    """

    is_truncated: bool
    unscored_tail: int


@dataclass(frozen=True)
class FinishedRow:
    """One finished row.

    Attributes:
        record: What its session saw.
        prompt: Prompt ids without padding.
        prefill_tokens: Trailing ids of the prompt that are supplied prefill.
        said: Ids the batch generated for it, up to its end; after a trip, up to the trip.
        ids: Ids that stand behind the prompt.
        redirected: What a trip led to, or None.
        bare: How it ended in a foreign loop, or None.
        pruned_beams: Beams of the same prompt that tripped and gave way to others.
        cancelled_after: Tokens that were released when its reader wanted no more, or None.
        ahead: Unseen ids that were decoded behind the response.
        withheld: Last tokens of `said` that do not stand, since too few follow them.
    """

    record: RowRecord
    prompt: tuple[int, ...]
    prefill_tokens: int
    said: tuple[int, ...]
    ids: tuple[int, ...]
    redirected: Redirected | None = None
    bare: BareEnd | None = None
    cancelled_after: int | None = None
    pruned_beams: int = 0
    ahead: tuple[int, ...] = ()
    withheld: int = 0

    @property
    def error(self) -> GuardError | None:
        """What failed, in the row's own run or in a continuation."""
        tries = self.redirected.tries if self.redirected else ()
        found = (self.record.error, *(attempt.record.error for attempt in tries))
        return next((error for error in found if error is not None), None)


@dataclass(frozen=True)
class TraceWriter:
    """What the rows of one call were judged by; writes their traces.

    Attributes:
        bundle: Digest of the bundle.
        heads: Of its probe.
        low_mark: Of its monitor.
        certificate: In force.
        policy: Of the call.
        reasoning: Certificate inside marked spans, or None.
        warnings: What to beware of with this bundle and certificate.
    """

    bundle: str
    heads: tuple[str, ...]
    low_mark: float
    certificate: Certificate
    policy: Policy
    reasoning: Certificate | None = None
    warnings: tuple[str, ...] = ()

    def trace(self, outcome: FinishedRow, void: str | None) -> SafetyTrace:
        """Write a row's trace; `void` says why the certificate does not hold, if so."""
        header = TraceHeader(
            bundle=self.bundle,
            heads=self.heads,
            alpha=self.certificate.alpha,
            population=self.certificate.population,
            threshold=outcome.record.threshold,
            certificate=self.certificate.status(void),
            redirect=self.policy.redirect,
            holdback_tokens=self.policy.holdback_tokens,
            reasoning_threshold=None if self.reasoning is None else self.reasoning.threshold,
            source=self.certificate.evidence.source,
            warnings=self.warnings,
        )
        steps = [*self._own_steps(outcome)]
        tries = outcome.redirected.tries if outcome.redirected else ()
        for number, attempt in enumerate(tries, start=1):
            steps += self._try_steps(outcome, attempt, number, is_last=number == len(tries))
        return SafetyTrace(header, tuple(steps), self._end(outcome))

    def _own_steps(self, outcome: FinishedRow) -> Iterator[TraceStep]:
        record = outcome.record
        turn = outcome.prompt + outcome.said[: record.judged] + outcome.ahead
        first = len(outcome.prompt) - record.scanned
        looks = {look.score: look.logit for look in record.looks}
        is_chat = record.scanned == outcome.prefill_tokens + 1
        for index, statistic in enumerate(record.statistic):
            action, why = self._verdict(outcome, index)
            at = first + index
            # A prompt of embeddings has no ids.
            known = 0 <= at < len(turn) and not (is_chat and index == 0)
            yield TraceStep(
                position=index,
                token=turn[at] if known else None,
                logits=tuple(record.logits[index]),
                statistic=statistic,
                action=action,
                why=why,
                check=looks.get(index),
                reasoning=bool(record.inside) and record.inside[index],
            )

    def _verdict(self, outcome: FinishedRow, index: int) -> tuple[Action, Reason]:
        record, is_newest = outcome.record, index == len(outcome.record.statistic) - 1
        if record.trip is not None and record.trip.error is not None and is_newest:
            return "close", _reason_of(record.trip.error)
        if record.alarm is None or index < record.alarm:
            own: Action = "ahead" if index >= record.scanned + record.judged else "pass"
            return ("scan" if index < record.scanned else own), "below_threshold"
        if record.looks:
            tripped = record.trip is not None and is_newest
            return ("trip", "above_threshold") if tripped else ("alarm", "cleared")
        if index == record.alarm:
            return ("alarm" if record.trip is None else "trip"), "above_threshold"
        if outcome.bare is not None and record.trip is not None and index >= record.scanned:
            return "force", "refusal"
        return "alarm", "latched"

    def _try_steps(
        self, outcome: FinishedRow, attempt: Try, number: int, *, is_last: bool
    ) -> Iterator[TraceStep]:
        record = attempt.record
        own = attempt.ids[: record.judged - attempt.withheld]
        tokens = attempt.opener + own + attempt.behind
        dropped = outcome.redirected is not None and outcome.redirected.drops_prefill
        before = attempt.start + (0 if dropped else outcome.prefill_tokens) + 1
        for index, statistic in enumerate(record.statistic):
            action: Action = "force" if index < record.scanned else "watch"
            why: Reason = "opener" if index < record.scanned else "latched"
            if record.alarm is not None and index >= record.alarm:
                # The last try that trips leads to the canned text.
                action, why = "trip", "tries_exhausted" if is_last else "above_threshold"
            yield TraceStep(
                position=before + index,
                token=tokens[index] if index < len(tokens) else None,
                logits=tuple(record.logits[index]),
                statistic=statistic,
                action=action,
                why=why,
                attempt=number,
                reasoning=bool(record.inside) and record.inside[index],
            )

    def _end(self, outcome: FinishedRow) -> TraceEnd:
        record, trip = outcome.record, outcome.record.trip
        tries = outcome.redirected.tries if outcome.redirected else ()
        released, dropped = self._counts(outcome)
        ahead = sum(one.ahead for one in (record, *(attempt.record for attempt in tries)))
        tripped_at = record.trip_score
        error, bare = outcome.error, outcome.bare
        return TraceEnd(
            outcome=self._word(outcome),
            released_tokens=released,
            dropped_tokens=dropped,
            prefill_tokens=outcome.prefill_tokens,
            trip_step=tripped_at,
            clear_point=self._clear_point(record, tripped_at),
            tries=len(tries),
            lookahead_tokens=ahead,
            withheld_tokens=outcome.withheld + sum(attempt.withheld for attempt in tries),
            unscored_tail=bare.unscored_tail if bare else 0,
            refusal_truncated=bare.is_truncated if bare else False,
            pruned_beams=outcome.pruned_beams,
            unprotected=not self.policy.protects or (error is not None and trip is None),
            error=None if error is None else f"{type(error).__name__}: {error}",
        )

    def _word(self, outcome: FinishedRow) -> OutcomeWord:
        record = outcome.record
        if outcome.cancelled_after is not None:
            return "cancelled"
        if record.trip is None:
            return "flagged" if record.trip_score is not None else "released"
        if outcome.error is not None:
            return "closed"
        how = outcome.redirected.how if outcome.redirected else self.policy.redirect
        return REDIRECTS[how].outcome

    def _counts(self, outcome: FinishedRow) -> tuple[int, int]:
        """Count model tokens that reached the reader, and those that did not."""
        trip = outcome.record.trip
        if outcome.cancelled_after is not None:
            return outcome.cancelled_after, max(0, len(outcome.said) - outcome.cancelled_after)
        if trip is None:
            unscored = outcome.bare.unscored_tail if outcome.bare else 0
            return outcome.record.judged + unscored - outcome.withheld, 0
        if outcome.bare is not None:
            return trip.cut.kept + trip.cut.dropped, 0
        tries = outcome.redirected.tries if outcome.redirected else ()
        kept = sum(min(attempt.kept, attempt.record.judged) for attempt in tries)
        held = sum(attempt.withheld for attempt in tries)
        lost = sum(attempt.record.judged for attempt in tries) - kept - held
        return trip.cut.kept + kept, trip.cut.dropped + lost

    def _clear_point(self, record: RowRecord, before: int | None) -> int | None:
        smoothed = record.smoothed[:before]
        clear = [index for index, value in enumerate(smoothed) if value < self.low_mark]
        return clear[-1] if clear else None


class LazyTraces(Sequence[SafetyTrace]):
    """The traces of a call, each written when it is first read.

    A trace is some microseconds a token, which would otherwise be paid by callers who never
    look at it.

    Args:
        rows: Who writes it, each finished row, and why its certificate is void, if it is.
    """

    def __init__(self, rows: Sequence[tuple[TraceWriter, FinishedRow, str | None]]) -> None:
        self._rows = tuple(rows)
        self._written: dict[int, SafetyTrace] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        """Count the traces; none is written for it."""
        return f"<{len(self)} traces>"

    @overload
    def __getitem__(self, index: int) -> SafetyTrace: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[SafetyTrace]: ...

    def __getitem__(self, index: int | slice) -> SafetyTrace | Sequence[SafetyTrace]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = range(len(self))[index]
        if row not in self._written:
            judgement, outcome, void = self._rows[row]
            self._written[row] = judgement.trace(outcome, void)
        return self._written[row]


def _reason_of(error: GuardError) -> Reason:
    if isinstance(error, NonFiniteError):
        return "non_finite"
    if isinstance(error, BeatError):
        return "missed_beat"
    return "forced_token_lost" if isinstance(error, ForcedTokenError) else "guard_error"
