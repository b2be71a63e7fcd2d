"""What a tripped row emits, and where it is cut.

`REDIRECTS` says of each redirect all that the rest of the project needs to know of it: to add
one, add its name to `safe_decode.decision.Redirect` and a row to this table. Knows cuts, forced
scores and scripts of forced ids. Does not know models, tokenizers or what a `generate` call is;
the same functions serve batch rows and request slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safe_decode.decision import Outcome, Redirect
from safe_decode.policy.holdback import released_tokens

__all__ = ["REDIRECTS", "CannedTexts", "Cut", "RedirectRule", "Script", "cut_of", "forced_scores"]


@dataclass(frozen=True)
class RedirectRule:
    """What one redirect does to a row that has tripped.

    Attributes:
        keeps: Which of the generated tokens stand. released: those that the reader has. clear:
            those up to the clear point as well. all: every one.
        says: Words of the guard behind them.
        outcome: How the row has ended, in one word.
        resumes: Whether the model goes on in its own words behind the guard's.
        protects: Whether a trip changes what the reader gets.
        if_guard_fails: The redirect that takes effect where the guard itself has failed.
        if_structured: The redirect that takes effect where the answer is read as data, so that
            words of the guard would be read as data too.
    """

    keeps: Literal["released", "clear", "all"]
    says: Literal["nothing", "refusal", "opener"]
    outcome: Outcome
    resumes: bool = False
    protects: bool = True
    if_guard_fails: Redirect = "refuse"
    if_structured: Redirect = "stop"


REDIRECTS: Mapping[Redirect, RedirectRule] = {
    "refuse": RedirectRule("released", "refusal", "refused"),
    # A guard that has failed is trusted with no continuation, so it refuses.
    "rewind": RedirectRule("clear", "opener", "rewound", resumes=True),
    "stop": RedirectRule("released", "nothing", "stopped", if_guard_fails="stop"),
    "flag": RedirectRule(
        "all",
        "nothing",
        "flagged",
        protects=False,
        if_guard_fails="flag",
        if_structured="flag",
    ),
}
"""Every redirect and what it does."""


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
        redirect: Its rule says what is kept; the clear point counts only where it lies behind
            what is released.
        said: Generated tokens so far, those that follow the tripping score included.
        judged: Leading generated tokens that were judged and did not trip.
        clear: Leading generated tokens judged by the clear point; 0 if there is none.
        holdback_tokens: k.
        content: Leading tokens of `said` that belong to the response, where unseen tokens were
            decoded behind its end; None: all.
    """
    content = said if content is None else min(said, content)
    released = min(released_tokens(judged, holdback_tokens), content)
    # The clear point judged tokens before the trip, so it never lies beyond `judged`.
    up_to_clear = max(released, min(clear, judged, content))
    kept = {"released": released, "clear": up_to_clear, "all": content}[REDIRECTS[redirect].keeps]
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
