"""From chosen and judged ids to events: what a reader sees of each row, and when.

The one room through which text comes to a reader, of the library's streams and of the server
alike. Knows the release rule, texts and events. Does not know models, scores or threads: a loop
says what was chosen and which rows tripped. Only who reads along needs this room; without
readers, the same rule is applied to the finished response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from safe_decode.decision import Redirect
from safe_decode.policy.holdback import HoldBack
from safe_decode.policy.redirect import Cut
from safe_decode.session.turns import Turns
from safe_decode.streaming.attempt_text import AttemptText, ReleaseRules
from safe_decode.streaming.events import (
    Ended,
    FinishReason,
    GuardText,
    Released,
    Tripped,
)
from safe_decode.trace.schema import SafetyTrace
from safe_decode.typing import Tokenizer

__all__ = ["Cancelled", "ReleaseRules", "RowRelease", "TripNotice"]


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
        emit: Callable[[Released | Tripped | GuardText], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self.row, self.rules, self.redirect = row, rules, redirect
        self.text = ""
        self.token_ids: list[int] = []
        self.shown_tokens = 0
        self.stop_string: str | None = None
        self.end_id: int | None = None
        self._tokenizer, self._emit, self._k = tokenizer, emit, holdback_tokens
        self._is_cancelled = is_cancelled
        self._attempt = 0
        self._n_released = 0
        self.is_closing = self._is_cut = False
        self._is_short = True
        self._begin(())

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
        return (*self._text.ids, *end)

    @property
    def released_tokens(self) -> int:
        """Count the model's tokens that were released, in all attempts."""
        return self._n_released

    @property
    def is_cut(self) -> bool:
        """Say whether the response is complete, though the model has not ended it."""
        return self._is_cut

    @property
    def n_chosen(self) -> int:
        """Count the tokens chosen in this attempt, unseen ones included, end ids left out."""
        return self._hold.said

    @property
    def reason(self) -> FinishReason:
        """Say why a row that was not redirected has ended."""
        # What is withheld is missing, as behind a cap.
        return "length" if self._hold.withheld or self._is_short else "stop"

    def require_reader(self) -> None:
        """Check that somebody still reads.

        Raises:
            Cancelled: Nobody does.
        """
        if self._is_cancelled():
            raise Cancelled

    def hear(self, token: int, **facts: Any) -> bool:  # noqa: ANN401 - fields of TokenNote
        """Take note of a chosen content id before `take`, for who has to end the row by its text.

        Args:
            token: Its id.
            **facts: What is known of it, see `TokenNote`.

        Returns:
            Whether it completes a stop string.
        """
        self._text.push(token, facts)
        return self._text.stop() is not None

    def say(self, token: int) -> None:
        """Take a chosen content id; nobody has judged it yet."""
        if len(self._text.ids) == self._hold.said:  # else it was heard
            self._text.push(token)
        self._text.stop()
        self._hold.say()
        self._release(self._hold.pin(self._text.held_from()))

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
                self.end_id, self._is_short = token, False
            self.end(wanted if turn == "stops" else 0)
        elif turn == "looks":
            self._is_short = self._is_short and self._is_cut
            self.cut()
            self._hold.say()
        else:
            self.say(token)
            if turn == "cut":
                self.cut()
        self.is_closing = turns.is_last[index]

    def judge(self, statistic: float | None = None) -> None:
        """All that was said before the newest choice has been judged and passed.

        Args:
            statistic: Of the newest score, where somebody asks for it.
        """
        waiting = self._hold.said - self._hold.judged
        if waiting:
            self._text.note_statistic(self._hold.judged + waiting - 1, statistic)
            self._release(self._hold.judge(waiting))

    def cut(self) -> None:
        """The response is complete, though the model has not ended it: what follows is unseen."""
        self._hold.close()
        self._is_cut = True

    def end(self, wanted: int = 0) -> None:
        """The row has ended and its tail was judged.

        Args:
            wanted: Unseen tokens that were to be judged behind it, see `HoldBack.end`.
        """
        stop_string = self._text.stop()
        if stop_string is not None:
            self.stop_string, self._is_short = stop_string, False
        self._release(self._hold.end(wanted=wanted), is_last=True)

    def trip(self, trip: TripNotice, statistic: float | None = None) -> int:
        """The row has tripped: release what the cut keeps, and say so.

        Args:
            trip: Its trip.
            statistic: Of the tripping score, where somebody asks for it.

        Returns:
            How many tokens were written and will not be shown.
        """
        self._text.note_statistic(self._hold.judged, statistic)
        kept = max(trip.cut.kept, self._hold.released)
        new = kept - self._hold.released
        self._hold.trip()
        if new:
            self._release(new)
        dropped = trip.cut.kept + trip.cut.dropped - kept
        error = None if trip.error is None else f"{type(trip.error).__name__}: {trip.error}"
        notes = self._text.notes(kept, kept + dropped)
        self._emit(
            Tripped(self.row, self.redirect, kept, dropped, self._attempt, error, statistic, notes)
        )
        self.is_closing = False
        return dropped

    def leave(self) -> None:
        """Nobody reads any more: nothing else is shown."""
        if not self.is_over:
            self._hold.trip()

    def speak(self, ids: Sequence[int], kind: Literal["refusal", "opener"]) -> None:
        """Show words of the guard behind what stands."""
        # Decoded behind what stands, as they will be read; a character cut in two shows so.
        whole = self._text.decoded([*self.token_ids, *ids])
        text = whole[len(self.text) :] if whole.startswith(self.text) else self._text.decoded(ids)
        self.token_ids += ids
        self.text += text
        self.shown_tokens += len(ids)
        self._emit(GuardText(self.row, text, tuple(ids), kind))

    def retry(self, opener: Sequence[int]) -> None:
        """Begin a continuation; its opener is shown with the first token released after it."""
        self._attempt += 1
        self._begin(tuple(opener))

    def ended(self, reason: FinishReason, trace: SafetyTrace) -> Ended:
        """Show what is left, and write the last event."""
        self.complete()
        ids = tuple(self.token_ids)
        return Ended(self.row, reason, self.text, ids, trace, self.stop_string)

    def complete(self) -> None:
        """Show what is left of a character that a stop or a cancellation has cut in two."""
        whole = self._text.decoded(self.token_ids)
        if (
            not self._text.is_clipped
            and len(whole) > len(self.text)
            and whole.startswith(self.text)
        ):
            rest = whole[len(self.text) :]
            self.text = whole
            self._emit(Released(self.row, rest, (), self._attempt))

    def _begin(self, opener: tuple[int, ...]) -> None:
        self._hold = HoldBack(self._k)
        self._text = AttemptText(self._tokenizer, [*self.token_ids, *opener], self.rules)
        self._opener, self.end_id = opener, None
        self.is_closing, self._is_cut, self._is_short = False, False, True

    def _release(self, new: int, *, is_last: bool = False) -> None:
        if self._opener and (new or is_last):
            opener, self._opener = self._opener, ()
            self.speak(opener, "opener")
        if not new and not is_last:
            return
        piece = self._text.take(new, is_last=is_last)
        if piece.ids or piece.text:
            self._n_released += len(piece.ids)
            self.shown_tokens += piece.n_shown(self.rules)
            self.token_ids += piece.ids
            self.text += piece.text
            self._emit(Released(self.row, piece.text, tuple(piece.ids), self._attempt, piece.notes))
