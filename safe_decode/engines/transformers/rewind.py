"""What becomes of one tripped row after its batch: canned text, or its own continuation.

Knows one row's ids, its cut, the texts and how to generate one row anew under the probe.
Does not know batches, prompts as text, or traces. A continuation draws from a generator of
its own, so the global one is left where bare `generate` leaves it.

The threshold never rises, and the probe watches each try; a second trip leads to the next
try, and after the last to the canned text. A continuation resumes the monitor at the cut:
scores up to there are settled, every position from the opener on is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from safe_decode.activations.tap import ActivationTap
from safe_decode.engines.transformers.loops.settings import CallSettings
from safe_decode.engines.transformers.loops.step import StepLoop
from safe_decode.monitor.monitor import MonitorConfig, MonitorState, RiskMonitor
from safe_decode.policy.policy import Policy
from safe_decode.policy.reasoning import OpenTurn, SpanMarks, SpanReader
from safe_decode.policy.redirect import CannedTexts
from safe_decode.probe.linear import LinearProbe
from safe_decode.session.records import Redirected, Try
from safe_decode.session.row_rng import RowRNG, continued_seed
from safe_decode.session.session import Session, Trip
from safe_decode.streaming.release import Releaser, RowRelease
from safe_decode.typing import CausalLM

__all__ = ["Rewinder"]


@dataclass(frozen=True)
class Rewinder:
    """Redirects the tripped rows of one call.

    Attributes:
        model: The protected model.
        tap: On its probe's sites.
        probe: On the model's device.
        config: The monitor's.
        threshold: Of every try too.
        policy: Of the call.
        texts: Canned ids.
        settings: Of the call.
        options: Keyword arguments of the call that a continuation repeats.
        context_tokens: Positions the model has, or None if it does not say.
        seed: Of the row's draws; None: the row's index and the global generator's seed.
        marks: Of reasoning, where it has a threshold of its own; or None.
        turn: The row's, as its prompt left it open; read with marks alone.
        stops: Says of the ids of a continuation [n] whether a stop string of the request ends it;
            None: `options` hold all that does.
    """

    model: CausalLM
    tap: ActivationTap
    probe: LinearProbe
    config: MonitorConfig
    threshold: float
    policy: Policy
    texts: CannedTexts
    settings: CallSettings
    options: Mapping[str, Any]
    context_tokens: int | None
    seed: int | None = None
    marks: SpanMarks | None = None
    turn: OpenTurn = OpenTurn()
    stops: Callable[[Tensor], bool] | None = None

    def redirect(
        self,
        trip: Trip,
        *,
        row: int,
        prompt: Sequence[int],
        prefill_tokens: int,
        said: Sequence[int],
        reader: RowRelease | None = None,
    ) -> Redirected:
        """Redirect one row.

        Args:
            trip: Its trip.
            row: Its index in the batch; seeds its generator.
            prompt: Its prompt ids without padding, the supplied prefill included.
            prefill_tokens: Trailing ids of `prompt` that are supplied prefill.
            said: Its generated ids.
            reader: Who reads the row while it runs; None: nobody.

        Raises:
            Cancelled: The reader wants no more.
        """
        kept = tuple(said[: trip.cut.kept])
        if self.policy.redirect == "stop":
            return Redirected(kept, "stop")
        if self.policy.redirect == "rewind" and trip.error is None:
            return self._rewind(trip.snapshot, row, tuple(prompt), prefill_tokens, kept, reader)
        turn = (*prompt[len(prompt) - prefill_tokens :], *kept)
        closing = self._closing(turn, self.turn)
        return Redirected(self._refused(kept, closing, reader), "refuse")

    def _rewind(
        self,
        snapshot: MonitorState | None,
        row: int,
        prompt: tuple[int, ...],
        prefill_tokens: int,
        kept: tuple[int, ...],
        reader: RowRelease | None,
    ) -> Redirected:
        # A prefill that nothing released builds on is the attacker's word, not the answer's.
        drops = prefill_tokens > 0 and not kept
        turn_start = len(prompt) - prefill_tokens
        base = prompt[:turn_start] if drops else prompt
        turn = self._continued(turn_start, 0 if drops else prefill_tokens, kept)
        tries: list[Try] = []
        repeats = False
        while len(tries) < self.policy.max_tries:
            opener = self.texts.opener_after if kept else self.texts.opener
            opener = self._closing((base + kept)[turn_start:], turn) + opener
            room = self._room(len(base), len(kept) + len(opener))
            if room < len(self.texts.refusal):
                break  # the model's own words would have less room than the canned ones
            if reader is not None:
                reader.require_reader()
                reader.retry(opener)
            seed = continued_seed(self.seed, row, len(tries))
            attempt, trip = self._continue(
                base, kept, opener, snapshot, room, seed, repeats, reader, turn
            )
            tries.append(attempt)
            if trip is None:
                return Redirected(kept + opener + attempt.ids, "rewind", tuple(tries), drops)
            if trip.error is not None:
                break
            repeats = attempt.kept == 0
            if not repeats:
                kept, snapshot = kept + opener + attempt.ids[: attempt.kept], trip.snapshot
        closing = self._closing((base + kept)[turn_start:], turn)
        return Redirected(self._refused(kept, closing, reader), "refuse", tuple(tries), drops)

    def _continued(self, start: int, given: int, kept: tuple[int, ...]) -> OpenTurn:
        """Describe the turn of the continuations: behind an opener nothing opens a span."""
        has_opened = self.marks is not None and kept[: len(self.marks.opens)] == self.marks.opens
        may_open = self.turn.may_open and has_opened
        return replace(self.turn, start=start, given=given, may_open=may_open)

    def _closing(self, ids: Sequence[int], turn: OpenTurn) -> tuple[int, ...]:
        """Close a span that the turn leaves open: what follows is for its reader."""
        is_open = self.marks is not None and self.marks.phases(ids, turn)[-1]
        return self.marks.closes if self.marks is not None and is_open else ()

    def _refused(
        self, kept: tuple[int, ...], closing: tuple[int, ...], reader: RowRelease | None
    ) -> tuple[int, ...]:
        text = closing + (self.texts.refusal_after if kept else self.texts.refusal)
        if reader is not None:
            reader.speak(text, "refusal")
        return kept + text + self.settings.end_ids[:1]

    def _room(self, prompt: int, said: int) -> int:
        room = self.settings.max_new_tokens - said
        if self.context_tokens is not None:
            room = min(room, self.context_tokens - prompt - said)
        return room

    def _continue(
        self,
        base: tuple[int, ...],
        kept: tuple[int, ...],
        opener: tuple[int, ...],
        snapshot: MonitorState | None,
        room: int,
        seed: int,
        repeats: bool,
        reader: RowRelease | None,
        turn: OpenTurn,
    ) -> tuple[Try, Trip | None]:
        device = self.model.device
        # A greedy try from the same context would only repeat itself.
        options: dict[str, Any] = {"do_sample": True, "temperature": 1.0} if repeats else {}
        ids = torch.tensor([base + kept + opener], device=device)
        if self.stops is not None:
            options["stopping_criteria"] = [_StopCriterion(self.stops, ids.shape[1])]
        spans = None if self.marks is None else SpanReader(self.marks, [turn], device)
        with self.tap.listening() as beats:
            session = Session(
                probe=self.probe,
                monitor=RiskMonitor(self.config, self.threshold),
                policy=self.policy,
                beats=beats,
                scanned=[len(opener)],
                device=device,
                resume=snapshot,
                spans=spans,
            )
            follower = None if reader is None else Releaser([reader])
            # Behind the cap there may be no position left to look at.
            limit = self.context_tokens
            loop = StepLoop(
                session,
                draws=RowRNG([seed], device),
                follower=follower,
                room=None if limit is None else [limit - ids.shape[1]],
            )
            sequences: Tensor = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                custom_generate=loop,
                **{**self.options, **options, "max_new_tokens": room},
            )
        record = session.records()[0]
        trip = session.trips.get(0)
        new = tuple(sequences[0, ids.shape[1] :].tolist())
        end = loop.ends[0]
        said = new[: record.judged] if trip else new[: end.n_ids]
        stands = trip.cut.kept if trip else len(said)
        behind = new[end.content - end.withheld : end.content] + loop.ahead(0, record.ahead)
        return Try(record, opener, said, stands, len(kept), end.withheld, behind), trip


class _StopCriterion:
    """Ends a continuation where a stop string of its request does. Duck-typed, as criteria are."""

    def __init__(self, stops: Callable[[Tensor], bool], start: int) -> None:
        self._stops, self._start = stops, start

    def __call__(self, input_ids: Tensor, _scores: object, **_: object) -> Tensor:
        found = self._stops(input_ids[0, self._start :])
        return torch.tensor([found], device=input_ids.device)
