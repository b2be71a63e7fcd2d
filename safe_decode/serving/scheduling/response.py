"""One response as its events arrive, and what clients are told of its safety.

Knows events, settings about what is exposed, and certificates. Does not know OpenAI's or
Anthropic's shapes. Statistics and thresholds are left out unless the operator exposes them.
What was taken back, how much and at which score is told to the page alone, and only where the
operator shows the bare model there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from safe_decode.certificate import Certificate
from safe_decode.engines.interface import GuardFacts
from safe_decode.engines.rows import RowRequest
from safe_decode.policy.redirect import REDIRECTS
from safe_decode.serving.schemas.notice import WITHHELD
from safe_decode.serving.settings import ServeSettings
from safe_decode.streaming.events import (
    Finished,
    GuardText,
    Released,
    RowEvent,
    TokenNote,
    Tripped,
)
from safe_decode.trace.risk import risk_of

__all__ = ["Exposure", "ResponseState", "is_before_trip", "notes_of", "pieces_of"]


@dataclass(frozen=True)
class Exposure:
    """What may be told of a row's guard.

    Attributes:
        facts: Of the engine.
        settings: The operator's.
        is_page: Whether the page reads it, which may show what was taken back.
    """

    facts: GuardFacts
    settings: ServeSettings
    is_page: bool = False

    def tokens(self, notes: Sequence[TokenNote], threshold: float) -> list[dict[str, Any]]:
        """Write tokens with their risks; empty unless scores are exposed."""
        if not self.settings.expose_scores:
            return []
        return [
            {
                "text": note.text,
                "statistic": note.statistic,
                "risk": None if note.statistic is None else risk_of(note.statistic, threshold),
            }
            for note in notes
        ]

    def certificate(self, request: RowRequest, void: str | None) -> dict[str, Any]:
        """Write what a row was certified by."""
        certificate = self.certificate_of(request)
        told: dict[str, Any] = {
            "status": "valid" if void is None else "void",
            "alpha": certificate.alpha,
            "confidence": 1 - certificate.delta,
            "responses": certificate.n,
            "population": certificate.population,
            "source": certificate.evidence.source,
            "bundle": self.facts.bundle[:16],
        }
        if void is not None:
            told["why"] = void
        if self.settings.expose_scores:
            told["threshold"] = certificate.threshold
        return told

    def certificate_of(self, request: RowRequest) -> Certificate:
        """Return the certificate a row is judged by."""
        return self.facts.certificate_of(request)


@dataclass
class ResponseState:
    """What has become of one row so far.

    Attributes:
        request: What was asked.
        exposure: What may be told.
        content: The model's released text; with `refusal_as_content`, all that is shown.
        refusal: What was said after a trip.
        notes: The tokens of the model before a trip.
        trip: The trip, if there was one.
        end: The end, once it came.
    """

    request: RowRequest
    exposure: Exposure
    content: str = ""
    refusal: str = ""
    notes: list[TokenNote] = field(default_factory=list)
    trip: Tripped | None = None
    end: Finished | None = None
    began_at: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    last_at: float | None = None

    def take(self, event: RowEvent) -> None:
        """Take note of an event."""
        if isinstance(event, Released | GuardText):
            self.last_at = time.monotonic()
            self.first_at = self.first_at or self.last_at
            self._hear(event)
        elif isinstance(event, Tripped):
            self.trip = self.trip or event
        else:
            self.end = event

    def shown_as_content(self, said: Released | GuardText) -> bool:
        """Say whether a text stands in `content`."""
        if is_before_trip(said):
            return True
        return self.exposure.settings.refusal_as_content and not self.request.is_structured

    def pieces(self, event: RowEvent) -> Iterator[RowEvent]:
        """Cut an event as readers get it; an end at which nothing was shown says so first."""
        has_turned = isinstance(event, Finished) and event.reason == "content_filter"
        if has_turned and not (self.content or self.refusal):
            yield GuardText(0, WITHHELD, (), "refusal")
        yield from pieces_of(event)

    @property
    def threshold(self) -> float:
        """What the row's statistic is compared with."""
        return self.exposure.certificate_of(self.request).threshold

    @property
    def would_block(self) -> bool | None:
        """Say whether the guard would have turned a response of the shadow; None: it guards."""
        protects = REDIRECTS[self.request.policy.redirect].protects
        if self.end is None or self.exposure.is_page or protects:
            return None
        return self.end.outcome in ("flagged", "closed")

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for the end; a row that was cut off has its length."""
        assert self.end is not None
        return "length" if self.end.reason == "cancelled" else self.end.reason

    @property
    def prompt_tokens(self) -> int:
        """Count the prompt."""
        return len(self.request.prompt.ids)

    @property
    def shown_tokens(self) -> int:
        """Count what was shown."""
        return 0 if self.end is None else self.end.shown_tokens

    def trip_told(self) -> dict[str, Any] | None:
        """Write the trip for those who may see it; None for the others."""
        settings, trip = self.exposure.settings, self.trip
        if trip is None or not settings.expose_scores:
            return None
        told: dict[str, Any] = {
            "redirect": trip.redirect,
            "statistic": trip.statistic,
            "risk": None if trip.statistic is None else risk_of(trip.statistic, self.threshold),
        }
        if self.exposure.is_page and settings.expose_bare:
            told["dropped_tokens"] = len(trip.dropped)
            told["dropped"] = self.exposure.tokens(trip.dropped, self.threshold)
        return told

    def safety(self) -> dict[str, Any]:
        """Write the safety object of a response that has ended."""
        assert self.end is not None
        told: dict[str, Any] = {
            "action": self.end.outcome or "cut",
            "certificate": self.exposure.certificate(self.request, self.end.void),
        }
        if self.request.changes:
            told["changed"] = [asdict(change) for change in self.request.changes]
        if self.would_block is not None:
            told["would_block"] = self.would_block
        if self.end.outcome == "flagged":
            told["unprotected"] = True
        if self.exposure.settings.expose_scores:
            told["tokens"] = self.exposure.tokens(self.notes, self.threshold)
            told["trip"] = self.trip_told()
        return told

    def _hear(self, said: Released | GuardText) -> None:
        if is_before_trip(said):
            self.notes += notes_of(said)
        else:
            self.refusal += said.text
        if self.shown_as_content(said):
            self.content += said.text


def is_before_trip(said: Released | GuardText) -> bool:
    """Say whether a text is the model's own from before any trip."""
    return isinstance(said, Released) and said.attempt == 0


def notes_of(said: Released | GuardText) -> tuple[TokenNote, ...]:
    """Return what is known of the tokens of a text; nothing of the guard's own."""
    return said.notes if isinstance(said, Released) else ()


def pieces_of(event: RowEvent) -> Iterator[RowEvent]:
    """Cut the model's own words into one event a token.

    A trip shows at once what stands, which until then was held back: in one piece, its length
    would tell a reader how far behind the trip it came.
    """
    if isinstance(event, Released) and len(event.notes) > 1:
        for note in event.notes:
            yield replace(event, text=note.text, token_ids=(note.token,), notes=(note,))
    else:
        yield event
