"""Release only what has been judged.

Knows counts: tokens said, judged and released. Does not know tokens, text, tensors or
streams; one `HoldBack` belongs to one row and is driven by whoever composes or streams it.

A token is released when it *and* the k tokens after it have been judged, or when the model
itself has ended the response and its tail was judged. Where somebody else ends it (a cap, a stop
string, a clock), what follows is decoded unseen and judged first; what could not be looked behind
so far is withheld: otherwise whoever picks the end picks what is judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safe_decode.errors import BeatError, ConfigurationError

__all__ = ["HoldBack", "released_tokens"]


def released_tokens(judged: int, holdback_tokens: int) -> int:
    """Count the tokens that are free while a response is still open.

    Args:
        judged: Leading tokens judged and not tripped.
        holdback_tokens: k, judged tokens that must follow.
    """
    return max(0, judged - holdback_tokens)


@dataclass
class HoldBack:
    """The release rule of one row, as a state machine.

    open --close--> open: the response is complete; what is said from here on is never shown.
    open --end--> ended: the response is released, but for a tail that should have been looked
        behind and could not.
    open --trip--> tripped: what is not yet released never will be.

    Attributes:
        holdback_tokens: k >= 0.
        said: Tokens chosen so far, unseen ones included.
        judged: Leading tokens that were judged and did not trip.
        released: Leading tokens that reached the reader; never decreases.
        phase: Where the row stands.
    """

    holdback_tokens: int
    said: int = 0
    judged: int = 0
    released: int = 0
    phase: Literal["open", "ended", "tripped"] = "open"
    _pinned: int | None = None
    _content: int | None = None

    def __post_init__(self) -> None:
        if self.holdback_tokens < 0:
            raise ConfigurationError(
                f"holdback_tokens={self.holdback_tokens} is negative; pass 0 or more tokens."
            )

    @property
    def content(self) -> int:
        """Count the tokens that belong to the response: all said before it was closed."""
        return self.said if self._content is None else self._content

    @property
    def withheld(self) -> int:
        """Count the tokens of an ended response that are not released."""
        return self.content - self.released if self.phase == "ended" else 0

    def say(self, n_tokens: int = 1) -> None:
        """Record chosen tokens; none of them is judged yet."""
        self._require_open("say")
        self.said += n_tokens

    def judge(self, n_tokens: int = 1) -> int:
        """Record that the next tokens were judged and passed.

        Returns:
            How many more tokens may now be released.

        Raises:
            BeatError: More tokens are judged than were said.
        """
        self._require_open("judge")
        if self.judged + n_tokens > self.said:
            raise BeatError(
                f"judged {self.judged + n_tokens} tokens of {self.said} said; "
                "each content token has exactly one score."
            )
        self.judged += n_tokens
        return self._release(released_tokens(self.judged, self.holdback_tokens))

    def pin(self, position: int | None) -> int:
        """Hold tokens from `position` on whatever is judged: a stop string may start there.

        Args:
            position: First token to hold, or None to lift the pin.

        Returns:
            How many more tokens may now be released.
        """
        self._require_open("pin")
        self._pinned = position
        return self._release(released_tokens(self.judged, self.holdback_tokens))

    def close(self) -> None:
        """Complete the response; tokens said from now on are looked at and never released."""
        self._require_open("close")
        if self._content is None:
            self._content = self.said

    def end(self, *, wanted: int = 0) -> int:
        """End the response; its tail must be judged.

        Args:
            wanted: Unseen tokens that were to be judged behind it; the tail that lacks some of
                them is withheld. 0 where the model itself has ended its turn, so that nothing
                follows.

        Returns:
            How many more tokens may now be released.

        Raises:
            BeatError: Tokens were said that nobody judged.
        """
        self._require_open("end")
        if self.judged != self.said:
            raise BeatError(
                f"the response ends with {self.said - self.judged} tokens not judged; run the "
                "closing forward first."
            )
        self.phase, self._pinned = "ended", None
        missing = max(0, wanted - (self.judged - self.content))
        return self._release(self.content - missing)

    def trip(self) -> int:
        """Stop releasing for good.

        Returns:
            How many tokens of the response will not be released.
        """
        self._require_open("trip")
        self.phase = "tripped"
        return self.content - self.released

    def _release(self, limit: int) -> int:
        limit = min(limit, self.content)
        if self._pinned is not None:
            limit = min(limit, self._pinned)
        new = max(0, limit - self.released)
        self.released += new
        return new

    def _require_open(self, action: str) -> None:
        if self.phase != "open":
            raise BeatError(f"cannot {action}: the row has {self.phase}; a latch does not reopen.")
