"""All rows of a running loop after one choice, and what the next choice makes of them.

Knows counts, ends and by whom a row was ended. Does not know devices, sessions or loops: all of it
is on the host.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from safe_decode.session.turns import Turn

__all__ = ["TURNS", "EndIds", "EndRules", "RowState"]

TURNS: tuple[Turn, ...] = ("says", "cut", "looks", "ends", "stops")


class EndIds(NamedTuple):
    """Ids that end a row.

    Attributes:
        all: Of the call.
        own: Those of them at which the model itself ends its turn.
    """

    all: tuple[int, ...]
    own: tuple[int, ...]


@dataclass(frozen=True)
class EndRules:
    """What ends the rows of a call.

    Attributes:
        ends: [n] ids that end a row.
        own_ends: [m] those of them at which the model itself ends its turn.
        wanted: [batch] unseen tokens that are to be judged behind a response that others end.
        limit: [batch] new tokens for which the row has positions.
        pads_after_end: Whether a row that has ended goes on with pads.
    """

    ends: Tensor
    own_ends: Tensor
    wanted: Tensor
    limit: Tensor
    pads_after_end: bool

    def reach(self, n_said: int) -> tuple[int, int]:
        """Bound, over all rows, the unseen tokens that fit behind `n_said` and are wanted."""
        (least, most), (near, far) = self._bounds
        return min(least, near - n_said), min(most, far - n_said)

    @cached_property
    def _bounds(self) -> tuple[tuple[int, int], tuple[int, int]]:
        wanted, limit = self.wanted.tolist(), self.limit.tolist()
        return (min(wanted), max(wanted)), (min(limit), max(limit))


@dataclass(frozen=True)
class RowState:
    """All rows after one choice, [batch] each, on the host.

    Attributes:
        latched: Rows that bare `generate` has ended, or that are parked.
        active: Rows whose newest token the next forward judges.
        closing: Of them, those that are over once it is judged.
        over: Rows that take no further token.
        content: Tokens of the response, end ids left out; -1: still open.
        has_end: Whether an end id stands behind them.
        looked: Unseen tokens so far.
        is_own: Whether the model itself has ended the row.
        turn: Index into `TURNS`.
    """

    latched: Tensor
    active: Tensor
    closing: Tensor
    over: Tensor
    content: Tensor
    has_end: Tensor
    looked: Tensor
    is_own: Tensor
    turn: Tensor

    @classmethod
    def fresh(cls, batch: int) -> RowState:
        """Begin with rows that are all open."""
        no = torch.zeros(batch, dtype=torch.bool)
        none = torch.zeros(batch, dtype=torch.int64)
        return cls(no, ~no, no, no, none - 1, no, none, no, none)

    def after(
        self,
        newest: Tensor,
        done: Tensor,
        n_said: int,
        trusted: Tensor | None,
        rules: EndRules,
        parked: Container[int],
    ) -> RowState:
        """Return the state after one choice.

        Args:
            newest: [batch] ids that were chosen last.
            done: [batch] bool, rows that bare `generate` ends with these.
            n_said: Tokens chosen so far.
            trusted: [batch] bool, rows in which an end id is the model's own choice; None: all.
            rules: What ends rows.
            parked: Rows that have tripped.
        """
        wanted = rules.wanted
        active, latched = self.active & ~self.closing, self.latched | done
        if parked:
            is_parked = torch.tensor([row in parked for row in range(len(done))])
            active, latched = active & ~is_parked, latched | is_parked
        # Without pads no row ends before its batch does.
        ends = done if rules.pads_after_end else latched.all().expand_as(done)
        looking = active & (self.content >= 0)
        ending = active & ~looking & ends
        is_end = torch.isin(newest, rules.ends) & (ending | looking)
        is_models = torch.isin(newest, rules.own_ends)
        is_own = is_models if trusted is None else is_models & trusted
        own = is_end & (is_own | (wanted == 0))
        lost = is_end & is_models & ~own
        content = torch.where(ending, n_said - is_end.long(), self.content)
        # An end id that is none of the model's own is read on over like any token.
        looked = self.looked + ((looking | (ending & is_end)) & ~own & ~lost).long()
        goes_on = (looking | ending) & ~own & ~lost
        closing = goes_on & (looked >= torch.minimum(wanted, rules.limit - content))
        active = active & ~own & ~lost
        turn = torch.where(ending, 1, 0)
        turn = torch.where(looking | (ending & is_end), 2, turn)
        turn = torch.where(own, 3, torch.where(lost, 4, turn))
        return RowState(
            latched=latched,
            active=active,
            closing=closing,
            over=~active | closing,
            content=content,
            has_end=self.has_end | (ending & is_end),
            looked=looked,
            is_own=self.is_own | own,
            turn=turn,
        )
