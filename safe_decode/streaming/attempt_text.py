"""The text of one attempt: what its ids add, where a stop string cuts it, what is known of each.

Knows a detokenizer, stop strings and notes. Does not know what was judged: whoever releases says
how many more ids may be shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from safe_decode.streaming.detokenizer import Detokenizer, StopWatch
from safe_decode.streaming.events import TokenNote
from safe_decode.typing import Tokenizer

__all__ = ["AttemptText", "ShownPiece", "ReleaseRules"]


@dataclass(frozen=True)
class ReleaseRules:
    """How the rows of one call are released.

    Attributes:
        stop_strings: As given to `generate`.
        includes_stop: Whether the text keeps the stop string that ended it, as `generate` has
            it.
        tells_notes: Whether events say what is known of each token.
    """

    stop_strings: tuple[str, ...] = ()
    includes_stop: bool = True
    tells_notes: bool = False


class ShownPiece(NamedTuple):
    """What is shown next.

    Attributes:
        text: What it adds.
        ids: Its ids, those that make a stop string left out.
        notes: One an id that is shown in whole or in part, where notes are asked for.
    """

    text: str
    ids: list[int]
    notes: tuple[TokenNote, ...]

    def n_shown(self, rules: ReleaseRules) -> int:
        """Count the tokens that are shown in whole or, where notes are asked for, in part."""
        return len(self.notes) if rules.tells_notes else len(self.ids)


class AttemptText:
    """The text of one attempt, as its ids are chosen.

    Args:
        tokenizer: Decodes.
        before: Ids that stand before its first one.
        rules: Of the call.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        before: Sequence[int],
        rules: ReleaseRules,
    ) -> None:
        self._rules = rules
        # The row's own run is decoded from its first id on, as its finished text is.
        self._said = Detokenizer(tokenizer, before)
        self._watch = StopWatch(self._said, rules.stop_strings)
        self._facts: dict[int, dict[str, Any]] = {}
        self._stop_at: int | None = None
        self._shown_ids = self._shown_chars = 0

    @property
    def ids(self) -> list[int]:
        """Ids that were chosen."""
        return self._said.ids

    @property
    def is_clipped(self) -> bool:
        """Say whether a stop string cuts the text."""
        return self._stop_at is not None

    def decoded(self, ids: Sequence[int]) -> str:
        """Decode ids on their own."""
        return self._said.decoded(ids)

    def push(self, token: int, facts: Mapping[str, Any] | None = None) -> None:
        """Append a chosen id, and what is known of it, see `TokenNote`."""
        self._said.push(token)
        if facts:
            self._facts[len(self.ids) - 1] = dict(facts)

    def note_statistic(self, index: int, statistic: float | None) -> None:
        """Take note of the score that judged an id, if it is told."""
        if statistic is not None:
            self._facts.setdefault(index, {})["statistic"] = statistic

    def stop(self) -> str | None:
        """Return the stop string that the newest id completes; the text is clipped there."""
        if not self._rules.stop_strings or not self.ids:
            return None
        found = self._watch.found()
        if found is None:
            return None
        if not self._rules.includes_stop:
            self._stop_at = found[1]
        return found[0]

    def held_from(self) -> int | None:
        """Return the first id that may be part of a stop string, found or to come; or None."""
        if not self._rules.stop_strings:
            return None
        if self._stop_at is not None:
            return self._watch.id_at(self._stop_at)
        return self._watch.held_from()

    def take(self, n_ids: int, *, is_last: bool) -> ShownPiece:
        """Take the next ids to be shown.

        Args:
            n_ids: How many.
            is_last: Whether the attempt has ended, so that no id follows.
        """
        said, first, last = self._said, self._shown_ids, self._shown_ids + n_ids
        is_whole = is_last and last == len(said.ids)  # else a tail is withheld
        if is_whole:
            said.flush()
        ids = said.ids[first:last]
        end = len(said.text) if is_whole else said.end_of(last) if last else 0
        notes = self.notes(first, last)
        if self._stop_at is not None and end > self._stop_at:
            ends, stop = said.ends[first:last], self._stop_at
            ids = [token for token, at in zip(ids, ends, strict=True) if at <= stop]
            end = max(stop, self._shown_chars)
        text = said.between(self._shown_chars, end)
        self._shown_ids, self._shown_chars = last, end
        return ShownPiece(text, ids, notes)

    def notes(self, first: int, last: int) -> tuple[TokenNote, ...]:
        """Say what is known of ids `first` to `last`, up to a stop string."""
        if not self._rules.tells_notes or first >= last:
            return ()
        said, stop, notes = self._said, self._stop_at, []
        begin = said.end_of(first) if first else 0
        for index in range(first, min(last, len(said.ids))):
            end = said.end_of(index + 1)
            if stop is not None and begin >= stop and end > begin:
                break  # it belongs to the stop string
            text = said.between(begin, end if stop is None else min(end, stop))
            notes.append(TokenNote(said.ids[index], text, **self._facts.get(index, {})))
            begin = end
        return tuple(notes)
