"""One row on its way from chosen ids to its reader: pieces of text, stop strings, the release.

Knows a tokenizer's decode, the release rule and the events of one row. Does not know models,
scores or batches. A piece is what an id adds to the text; an id inside a character adds
nothing, and the id that completes it adds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from safe_decode.engines.rows import Finished, FinishReason, Row, Said, TokenNote
from safe_decode.policy.holdback import HoldBack

__all__ = ["Decode", "Pieces", "ServedRowRelease"]

Decode = Callable[[Sequence[int]], str]
"""From ids to their text, special tokens left out."""

_INCOMPLETE = "\ufffd"


class Pieces:
    """The text of a growing row, id by id.

    Decoded over a short window that begins where a character ends, since a decoder may join
    ids, and a whole row decoded anew for each id would cost its length squared.

    Args:
        decode: The tokenizer's.
    """

    def __init__(self, decode: Decode) -> None:
        self.text = ""
        self._decode = decode
        self._ids: list[int] = []
        self._window = self._read = 0
        self._settled = ""

    def push(self, token: int) -> str:
        """Append one id and return what it adds."""
        self._ids.append(token)
        shown = self._decode(self._ids[self._window :])
        if len(shown) <= len(self._settled) or shown.endswith(_INCOMPLETE):
            return ""
        piece = shown[len(self._settled) :]
        self._window, self._read = self._read, len(self._ids)
        self._settled = self._decode(self._ids[self._window :])
        self.text += piece
        return piece

    def flush(self) -> str:
        """Return what waited for a character to be completed; no id follows."""
        rest = self._decode(self._ids[self._window :])[len(self._settled) :]
        self.text += rest
        return rest


class ServedRowRelease:
    """Follows one row and tells its reader what may be shown.

    Args:
        row: Whose events these are.
        decode: The tokenizer's.
        void: Why the certificate does not speak of it, or None.
    """

    def __init__(self, row: Row, decode: Decode, *, void: str | None) -> None:
        self.row, self.void = row, void
        self.said_ids: list[int] = []
        self.is_closing = False
        self.is_cut = False
        self.is_over = False
        self.ends_by: FinishReason = "length"
        self.shown_tokens = 0
        self._hold = HoldBack(row.request.policy.holdback_tokens)
        self._pieces, self._decode = Pieces(decode), decode
        self._notes: list[TokenNote] = []
        self._ends: list[int] = []  # length of the text behind each token
        self._fresh = 0
        self.stop: str | None = None
        self._stop_at: int | None = None
        self._shown_chars = 0

    @property
    def goes_on(self) -> bool:
        """Say whether the next chosen id belongs to its response."""
        return not self.is_over and not self.is_cut

    @property
    def scores(self) -> int:
        """Count the scores its run has had: those of its prompt, then one a judged token."""
        return self.row.request.prompt.scanned + self._hold.said - self._fresh

    def say(self, note: TokenNote) -> bool:
        """Take a chosen content id, which nobody has judged yet.

        Returns:
            Whether a stop string is complete, so that the row is to end.
        """
        piece = self._pieces.push(note.token)
        self.said_ids.append(note.token)
        self._notes.append(replace(note, text=piece))
        self._ends.append(len(self._pieces.text))
        self._hold.say()
        self._fresh = 1
        stops = self.row.request.sampling.stop
        if not stops or not piece:
            return False
        found = self._found(stops, len(piece))
        if found is None:
            self._emit(self._hold.pin(self._held_from(stops)))
            return False
        self._stop_at, self.stop = found
        self._hold.pin(self._id_at(self._stop_at))
        return True

    def judge(self, statistic: float | None) -> None:
        """All that was said before the newest choice was judged and passed.

        Args:
            statistic: Of the newest score, if it is told.
        """
        waiting = self._hold.said - self._hold.judged - self._fresh
        self._fresh = 0
        if waiting:
            last = self._hold.judged + waiting - 1
            if last < len(self._notes):
                self._notes[last] = replace(self._notes[last], statistic=statistic)
            self._emit(self._hold.judge(waiting))

    def cut(self, reason: FinishReason) -> None:
        """The response is complete, though the model has not ended it: what follows is unseen."""
        if not self.is_cut:
            self.is_cut = True
            self._hold.close()
            self.ends_by = "stop" if self.stop is not None else reason

    def look(self) -> None:
        """Take note of an unseen token behind the response; nobody has judged it yet."""
        self._hold.say()

    def tail_is_judged(self) -> None:
        """The closing forward has judged the newest choice too."""
        self._fresh = 0

    def end(self, wanted: int = 0, *, is_flagged: bool = False) -> None:
        """The row has ended and its tail was judged.

        Args:
            wanted: Unseen tokens that were to be judged behind it, see `HoldBack.end`.
            is_flagged: It crossed the threshold, and its redirect changes nothing.
        """
        self.is_over = True
        rest = self._pieces.flush()
        if rest:
            self._notes[-1] = replace(self._notes[-1], text=self._notes[-1].text + rest)
            self._ends[-1] = len(self._pieces.text)
        self._emit(self._hold.end(wanted=wanted))
        # What is withheld is missing, as behind a cap.
        reason = "length" if self._hold.withheld else self.ends_by
        self.finish(reason, is_flagged=is_flagged)

    def trip(self, kept: int, statistic: float | None) -> tuple[TokenNote, ...]:
        """The row has tripped: show what stands.

        Args:
            kept: Leading tokens that stand.
            statistic: Of the tripping score; None if the guard failed.

        Returns:
            What was written and is not shown.
        """
        self.is_over = True
        released = self._hold.released
        tripping = self._hold.judged
        if tripping < len(self._notes):
            self._notes[tripping] = replace(self._notes[tripping], statistic=statistic)
        self._hold.trip()
        if kept > released:
            self._show(released, kept)
        return tuple(self._notes[max(kept, released) :])

    def speak(self, ids: Sequence[int], before: Sequence[int], *, n_models: int = 0) -> None:
        """Show what follows a trip.

        Args:
            ids: Ids of the guard and of the continuation.
            before: Ids that stand, so that the text joins.
            n_models: How many of the last ids are the model's own words, which a stop string
                ends; the words of the guard are never cut.
        """
        if not ids:
            return
        pieces = Pieces(self._decode)
        for token in before:
            pieces.push(token)
        notes = [TokenNote(token, pieces.push(token)) for token in ids]
        rest = pieces.flush()
        notes[-1] = replace(notes[-1], text=notes[-1].text + rest)
        if n_models:
            first = len(notes) - n_models
            notes = notes[:first] + self._stopped(notes[first:])
        self.shown_tokens += len(notes)
        text = "".join(note.text for note in notes)
        self.row.emit(Said(text, tuple(notes), by="redirect"))

    def finish(self, reason: FinishReason, *, is_flagged: bool = False) -> None:
        """Emit the last event of a row that was not redirected."""
        self.is_over = True
        word: Literal["flagged", "released"] = "flagged" if is_flagged else "released"
        self.row.emit(
            Finished(
                reason,
                outcome=None if reason == "cancelled" else word,
                shown_tokens=self.shown_tokens,
                void=self.void,
                stop=self.stop,
            )
        )

    def _stopped(self, notes: Sequence[TokenNote]) -> list[TokenNote]:
        """Cut the words of a continuation at the first stop string in them."""
        text = "".join(note.text for note in notes)
        places = [(text.find(stop), stop) for stop in self.row.request.sampling.stop]
        place, self.stop = min((p for p in places if p[0] >= 0), default=(len(text), None))
        if self.stop is None:
            return list(notes)
        kept, end = [], 0
        for note in notes:
            if end < place:
                kept.append(replace(note, text=note.text[: place - end]))
            end += len(note.text)
        return kept

    def _emit(self, new: int) -> None:
        if new:
            self._show(self._hold.released - new, self._hold.released)

    def _show(self, first: int, last: int) -> None:
        notes = self._notes[first:last]
        if self._stop_at is not None:
            notes = self._clipped(notes, first)
        text = "".join(note.text for note in notes)
        self.shown_tokens += len(notes)
        if notes:
            self.row.emit(Said(text, tuple(notes)))

    def _clipped(self, notes: Sequence[TokenNote], first: int) -> list[TokenNote]:
        assert self._stop_at is not None
        clipped = []
        for index, note in enumerate(notes, start=first):
            begins = self._ends[index] - len(note.text)
            if begins < self._stop_at:
                clipped.append(replace(note, text=note.text[: self._stop_at - begins]))
        return clipped

    def _found(self, stops: Sequence[str], new: int) -> tuple[int, str] | None:
        text = self._pieces.text
        places = [
            (text.find(stop, max(0, len(text) - new - len(stop) + 1)), stop) for stop in stops
        ]
        return min((place for place in places if place[0] >= 0), default=None)

    def _held_from(self, stops: Sequence[str]) -> int | None:
        text = self._pieces.text
        for length in range(min(max(map(len, stops)), len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in stops):
                return self._id_at(len(text) - length)
        return None

    def _id_at(self, char: int) -> int:
        return next((i for i, end in enumerate(self._ends) if end > char), len(self._ends))
