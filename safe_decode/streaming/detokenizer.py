"""Ids of one row as text, while they arrive: whole characters only, stop strings watched.

Knows a tokenizer's `decode` and strings. Does not know what was judged or released.

A byte-level tokenizer may split a character over several ids, and a decoder may join ids
(leading spaces). So text is decoded over a short window of ids that begins where a
character ends, and what ends in the replacement character waits for the next id.
"""

from __future__ import annotations

from collections.abc import Sequence

from safe_decode.typing import Tokenizer

__all__ = ["StopWatch", "Detokenizer"]

_INCOMPLETE = "\ufffd"
_CONTEXT = 16
"""Ids of context that decide how text is joined; a character is split over far fewer."""


class Detokenizer:
    """The text of a growing row.

    Decoded when somebody reads it and no further than is read: a reader waits for the first
    tokens, and those that are held back behind them would make him wait longer.

    Args:
        tokenizer: Decodes; special tokens are skipped.
        before: Ids that stand before the row's first one; they are no part of its text, but
            decide how it is joined to them.

    Attributes:
        ids: What was pushed.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.ids: list[int] = []
        self._text = ""
        self._ends: list[int] = []  # of the text, once each id was read
        self._tokenizer = tokenizer
        self._all = list(before[-_CONTEXT:])
        self._n_before = len(self._all)
        self._window, self._read = 0, len(self._all)
        self._settled = self.decoded(self._all)

    @property
    def text(self) -> str:
        """All of it, up to the last whole character."""
        self._read_to(len(self.ids))
        return self._text

    @property
    def ends(self) -> list[int]:
        """For each id, the length of the text up to it."""
        self._read_to(len(self.ids))
        return self._ends

    def push(self, token: int) -> None:
        """Append one id."""
        self.ids.append(token)
        self._all.append(token)

    def end_of(self, n_ids: int) -> int:
        """Return the length of the text of the first `n_ids`."""
        self._read_to(n_ids)
        return self._ends[n_ids - 1]

    def between(self, first: int, last: int) -> str:
        """Return characters of what was read."""
        return self._text[first:last]

    def flush(self) -> None:
        """Add what waited for a character to be completed; no id follows."""
        self._read_to(len(self.ids))
        self._text += self.decoded(self._all[self._window :])[len(self._settled) :]
        if self._ends:
            self._ends[-1] = len(self._text)

    def _read_to(self, n_ids: int) -> None:
        for read in range(self._n_before + len(self._ends) + 1, self._n_before + n_ids + 1):
            shown = self.decoded(self._all[self._window : read])
            if len(shown) > len(self._settled) and not shown.endswith(_INCOMPLETE):
                self._text += shown[len(self._settled) :]
                self._window, self._read = self._read, read
                self._settled = self.decoded(self._all[self._window : read])
            self._ends.append(len(self._text))

    def decoded(self, ids: Sequence[int]) -> str:
        """Decode ids on their own."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class StopWatch:
    """Finds stop strings, and the beginnings of such, at the end of a transcript.

    Args:
        transcript: Watched.
        stop_strings: None of them empty.
    """

    def __init__(self, transcript: Detokenizer, stop_strings: Sequence[str]) -> None:
        self._transcript = transcript
        self._stops = tuple(stop_strings)
        self._longest = max((len(stop) for stop in self._stops), default=0)

    def held_from(self) -> int | None:
        """Return the first id that may be part of a stop string to come, or None.

        Ids whose text is not complete count as held while anything is.
        """
        text = self._transcript.text
        for length in range(min(self._longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return self.id_at(len(text) - length)
        return None

    def found(self) -> tuple[str, int] | None:
        """Return the stop string that the newest id completed, and where it begins."""
        text, ends = self._transcript.text, self._transcript.ends
        before = ends[-2] if len(ends) > 1 else 0
        start = max(0, before - self._longest + 1)
        places = [(text.find(stop, start), stop) for stop in self._stops]
        hits = [(place, stop) for place, stop in places if place >= 0]
        return None if not hits else (min(hits)[1], min(hits)[0])

    def id_at(self, char: int) -> int:
        """Return the index of the id that adds a character of the text."""
        ends = self._transcript.ends
        return next((i for i, end in enumerate(ends) if end > char), len(ends))
