"""What a tripped row emits, and where it is cut.

Knows cuts, forced scores and scripts of forced ids. Does not know models, tokenizers or
what a `generate` call is; the same functions serve batch rows and request slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_decode.decision import Redirect
from safe_decode.policy.holdback import released_tokens

__all__ = ["CannedTexts", "Cut", "Script", "cut_of", "forced_scores"]


@dataclass(frozen=True)
class Cut:
    """Where a tripped row is cut.

    Attributes:
        kept: Leading generated tokens that stay.
        released: Leading generated tokens that had reached the reader; never more than kept.
        dropped: Generated tokens that go.
    """

    kept: int
    released: int
    dropped: int


def cut_of(
    redirect: Redirect,
    *,
    said: int,
    judged: int,
    clear: int,
    holdback_tokens: int,
    content: int | None = None,
) -> Cut:
    """Cut a row that has tripped.

    Args:
        redirect: refuse and stop keep what is released; rewind keeps what was said up to
            the later of the clear point and the first position not released; flag keeps all.
        said: Generated tokens so far, those that follow the tripping score included.
        judged: Leading generated tokens that were judged and did not trip.
        clear: Leading generated tokens judged by the clear point; 0 if there is none.
        holdback_tokens: k.
        content: Leading tokens of `said` that belong to the response, where unseen tokens were
            decoded behind its end; None: all.
    """
    content = said if content is None else min(said, content)
    released = min(released_tokens(judged, holdback_tokens), content)
    kept = content if redirect == "flag" else released
    if redirect == "rewind":
        # The clear point judged tokens before the trip, so it never lies beyond `judged`.
        kept = max(released, min(clear, judged, content))
    return Cut(kept=kept, released=min(released, kept), dropped=content - kept)


def forced_scores(scores: Tensor, rows: Mapping[int, int]) -> Tensor:
    """Force one id in some rows: 0 for it, -inf for all others.

    Args:
        scores: [batch, vocab] float. Not changed, and what it holds in the forced rows is
            not read: it may be -inf or NaN there.
        rows: Row -> forced id.

    Returns:
        A new tensor [batch, vocab]; other rows are copied bit for bit.
    """
    new = scores.clone()
    for row, token in rows.items():
        new[row] = -torch.inf
        new[row, token] = 0.0
    return new


class Script:
    """Ids that one row must emit, in order, and the check that they arrived.

    Args:
        ids: Ids to force, one a step.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = tuple(ids)
        self._next = 0
        self._due: int | None = None

    @property
    def is_done(self) -> bool:
        """Say whether every id was forced and arrived."""
        return self._next >= len(self._ids) and self._due is None

    @property
    def has_next(self) -> bool:
        """Say whether there is an id still to force."""
        return self._next < len(self._ids)

    @property
    def arrived(self) -> int:
        """Count the ids that were emitted."""
        return self._next - (self._due is not None)

    def force(self) -> int:
        """Return the id to force now; the next `check` expects it."""
        self._due = self._ids[self._next]
        self._next += 1
        return self._due

    def check(self, token: int) -> int | None:
        """Compare the id that was emitted with the one that was due.

        Args:
            token: What the row emitted.

        Returns:
            The id that was due if another arrived, else None.
        """
        due, self._due = self._due, None
        return due if due is not None and due != token else None


@dataclass(frozen=True)
class CannedTexts:
    """Canned text as ids, alone and after kept text.

    Attributes:
        refusal: At the start of a turn.
        refusal_after: After kept text, joined to it.
        opener: At the start of a turn.
        opener_after: After kept text, joined to it.
    """

    refusal: tuple[int, ...]
    refusal_after: tuple[int, ...]
    opener: tuple[int, ...]
    opener_after: tuple[int, ...]
