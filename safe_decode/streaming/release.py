"""From chosen and judged ids to events: what a reader sees of each row, and when.

Knows the release rule, texts and events. Does not know models, scores or threads: a loop
says what was chosen and which rows tripped. Only a stream needs this module; without one,
the same rule is applied to the finished response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from safe_decode.decision import Redirect
from safe_decode.policy.holdback import HoldBack
from safe_decode.policy.redirect import Cut
from safe_decode.session.turns import Turns
from safe_decode.streaming.detokenizer import Detokenizer, StopWatch
from safe_decode.streaming.events import (
    Ended,
    FinishReason,
    GuardText,
    Released,
    StreamEvent,
    Tripped,
)
from safe_decode.trace.schema import SafetyTrace
from safe_decode.typing import Tokenizer

__all__ = ["Cancelled", "ReleaseRules", "Releaser", "RowRelease", "TripNotice"]


class Cancelled(Exception):  # noqa: N818 - no error: the reader asked for it
    """The reader wants no more; raised inside the loop to leave it."""


class TripNotice(Protocol):
    """What is needed of a trip."""

    @property
    def cut(self) -> Cut:
        """Where the row is cut."""
        ...

    @property
    def error(self) -> Exception | None:
        """What failed, or None for an alarm."""
        ...


@dataclass(frozen=True)
class ReleaseRules:
    """How the rows of one call are released.

    Attributes:
        stop_strings: As given to `generate`.
        includes_stop: Whether the text keeps the stop string that ended it, as `generate` has
            it.
    """

    stop_strings: tuple[str, ...] = ()
    includes_stop: bool = True


class RowRelease:
    """One row on its way to its reader.

    Args:
        row: Its index in the events.
        tokenizer: Decodes.
        holdback_tokens: k.
        redirect: What a trip leads to; for the events only.
        rules: Of the call.
        emit: Takes the events.
        is_cancelled: Asked at each choice.
    """

    def __init__(
        self,
        row: int,
        tokenizer: Tokenizer,
        *,
        holdback_tokens: int,
        redirect: Redirect,
        rules: ReleaseRules,
        emit: Callable[[StreamEvent], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self.row, self.rules, self.redirect = row, rules, redirect
        self.text = ""
        self.token_ids: list[int] = []
        self.stop_string: str | None = None
        self.is_closing = False
        self.end_id: int | None = None
        self._tokenizer, self._emit, self._k = tokenizer, emit, holdback_tokens
        self._is_cancelled = is_cancelled
        self._attempt = 0
        self._opener: tuple[int, ...] = ()
        self._stop_at: int | None = None
        self._n_released = 0
        self._begin()

    @property
    def is_over(self) -> bool:
        """Say whether this attempt has ended or tripped."""
        return self._hold.phase != "open"

    @property
    def withheld_tokens(self) -> int:
        """Count the tokens of the response that are not shown, since too few follow them."""
        return self._hold.withheld

    @property
    def said_ids(self) -> tuple[int, ...]:
        """All ids chosen in this attempt, its end id included."""
        end = () if self.end_id is None else (self.end_id,)
        return (*self._said.ids, *end)

    @property
    def released_tokens(self) -> int:
        """Count the model's tokens that were released, in all attempts."""
        return self._n_released

    def require_reader(self) -> None:
        """Check that somebody still reads.

        Raises:
            Cancelled: Nobody does.
        """
        if self._is_cancelled():
            raise Cancelled

    def say(self, token: int) -> None:
        """Take a chosen content id; nobody has judged it yet."""
        self._said.push(token)
        self._hold.say()
        if self.rules.stop_strings:
            self._release(self._hold.pin(self._watch.held_from()))

    def take(self, token: int, index: int, turns: Turns) -> None:
        """Take a choice, what was said before it being judged.

        Args:
            token: Its id.
            index: Of the row in `turns`.
            turns: What the choice is to each row.
        """
        turn, wanted = turns.turns[index], turns.wanted[index]
        if self.is_closing:
            self.end(wanted)
        elif turn in ("ends", "stops"):
            if not self._is_cut:
                self.end_id = token
            self.end(wanted if turn == "stops" else 0)
        elif turn == "looks":
            self.cut()
            self.look()
        else:
            self.say(token)
            if turn == "cut":
                self.cut()
        self.is_closing = turns.is_last[index]

    def judge(self) -> None:
        """All that was said before the newest choice has been judged and passed."""
        waiting = self._hold.said - self._hold.judged
        if waiting:
            self._release(self._hold.judge(waiting))

    def cut(self) -> None:
        """The response is complete, though the model has not ended it: what follows is unseen."""
        self._hold.close()
        self._is_cut = True

    def look(self) -> None:
        """Take note of an unseen token behind the response; nobody has judged it yet."""
        self._hold.say()

    def end(self, wanted: int = 0) -> None:
        """The row has ended and its tail was judged.

        Args:
            wanted: Unseen tokens that were to be judged behind it, see `HoldBack.end`.
        """
        found = self._watch.found() if self.rules.stop_strings and self._said.ids else None
        if found is not None:
            self.stop_string, place = found
            self._stop_at = None if self.rules.includes_stop else place
        self._release(self._hold.end(wanted=wanted), is_last=True)

    def trip(self, trip: TripNotice) -> None:
        """The row has tripped: release what the cut keeps, and say so."""
        kept = max(trip.cut.kept, self._hold.released)
        new = kept - self._hold.released
        self._hold.trip()
        if new:
            self._release(new)
        dropped = trip.cut.kept + trip.cut.dropped - kept
        error = None if trip.error is None else f"{type(trip.error).__name__}: {trip.error}"
        self._emit(Tripped(self.row, self.redirect, kept, dropped, self._attempt, error))
        self.is_closing = False

    def speak(self, ids: Sequence[int], kind: Literal["refusal", "opener"]) -> None:
        """Show words of the guard behind what stands."""
        # Decoded behind what stands, as they will be read; a character cut in two shows so.
        whole = self._said.decoded([*self.token_ids, *ids])
        text = whole[len(self.text) :] if whole.startswith(self.text) else self._said.decoded(ids)
        self.token_ids += ids
        self.text += text
        self._emit(GuardText(self.row, text, tuple(ids), kind))

    def retry(self, opener: Sequence[int]) -> None:
        """Begin a continuation; its opener is shown with the first token released after it."""
        self._attempt += 1
        self._opener = tuple(opener)
        self._begin()

    def finish(self, reason: FinishReason, trace: SafetyTrace) -> None:
        """Emit the last event."""
        ids = tuple(self.token_ids)
        whole = self._said.decoded(ids)
        if self._stop_at is None and len(whole) > len(self.text) and whole.startswith(self.text):
            # A stop or a cancellation has cut a character in two.
            rest = whole[len(self.text) :]
            self.text = whole
            self._emit(Released(self.row, rest, (), self._attempt))
        self._emit(Ended(self.row, reason, self.text, ids, trace, self.stop_string))

    def _begin(self) -> None:
        self._hold = HoldBack(self._k)
        # The row's own run is decoded from its first id on, as its finished text is.
        self._said = Detokenizer(self._tokenizer, [*self.token_ids, *self._opener])
        self._watch = StopWatch(self._said, self.rules.stop_strings)
        self._shown_tokens = self._shown_chars = 0
        self.is_closing, self.end_id, self._is_cut = False, None, False

    def _release(self, new: int, *, is_last: bool = False) -> None:
        if self._opener and (new or is_last):
            opener, self._opener = self._opener, ()
            self.speak(opener, "opener")
        if new or is_last:
            self._show(new, is_last=is_last)

    def _show(self, new: int, *, is_last: bool = False) -> None:
        said, first, last = self._said, self._shown_tokens, self._shown_tokens + new
        is_whole = is_last and last == len(said.ids)  # else a tail is withheld
        if is_whole:
            said.flush()
        ids = said.ids[first:last]
        stop = len(said.text) if is_whole else said.end_of(last) if last else 0
        if is_last and self._stop_at is not None and stop > self._stop_at:
            stop = self._stop_at
            ends = said.ends[first:last]
            ids = [token for token, end in zip(ids, ends, strict=True) if end <= stop]
        text = said.between(self._shown_chars, stop)
        self._shown_tokens, self._shown_chars = last, stop
        if ids or text:
            self._n_released += len(ids)
            self.token_ids += ids
            self.text += text
            self._emit(Released(self.row, text, tuple(ids), self._attempt))


class Releaser:
    """Follows the loop of one batch.

    Args:
        rows: One each, in the order of the batch.
    """

    def __init__(self, rows: Sequence[RowRelease]) -> None:
        self.rows = tuple(rows)

    def on_choice(
        self, newest: Sequence[int], turns: Turns | None, trips: Mapping[int, TripNotice]
    ) -> None:
        """Take note of one choice in each row, see `Follower`.

        Raises:
            Cancelled: The reader wants no more.
        """
        self.rows[0].require_reader()
        for index, row in enumerate(self.rows):
            if row.is_over:
                continue
            if index in trips:
                row.trip(trips[index])
                continue
            row.judge()
            if turns is None:
                row.say(newest[index])
            else:
                row.take(newest[index], index, turns)

    def on_end(self, wanted: Sequence[int], trips: Mapping[int, TripNotice]) -> None:
        """All rows have ended and their tails were judged, see `Follower`."""
        for index, row in enumerate(self.rows):
            if row.is_over:
                continue
            if index in trips:
                row.trip(trips[index])
            else:
                row.judge()
                row.end(wanted[index])
