"""The rows of one worker: what the statistic says of each, and which id it must say next.

Every request has a seat. A step judges, for all rows of a batch at once, each position that came
since the last one, in order and once, and returns one id a row to force. The monitor and the
policy are those of every engine; sessions are not used, since they gather scores on the host
whenever a row joins. While nothing trips, nothing on an accelerator is waited for.

Knows seats, scores, ids and logits. Does not know requests or text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safe_decode.engines.vllm.rows.row_terms import RowTerms
from safe_decode.engines.vllm.rows.score_slots import ScoreSlots
from safe_decode.engines.vllm.rows.signals import SignalIds
from safe_decode.monitor.config import MonitorConfig
from safe_decode.monitor.monitor import MonitorState, RiskMonitor
from safe_decode.policy.redirect import CannedTexts

__all__ = ["NOTHING", "Counts", "JudgedRows", "RowJudge"]

NOTHING = -1
"""In the place of an id: the row chooses for itself."""

Counts = NDArray[np.int64]
"""[rows] on the host."""


@dataclass(frozen=True)
class JudgedRows:
    """The rows of one step, in the order of their logits.

    Attributes:
        seats: [rows] on the host.
        read: [rows] on the host, positions of each that were read so far.
        in_forward: [rows] on the host, how many of them this forward has read.
        known: [rows] on the host, tokens of each that are known; a row that has read fewer is in
            the middle of its prompt and chooses nothing.
        newest: [rows] the id that each has read last.
        blocks: [rows, n] blocks of the cache that hold each.
        block_size: Positions of a block.
    """

    seats: Counts
    read: Counts
    in_forward: Counts
    known: Counts
    newest: Tensor
    blocks: Tensor
    block_size: int

    @property
    def is_whole(self) -> NDArray[np.bool_]:
        """[rows] whether the row chooses its next token now."""
        return self.read >= self.known

    def only(self, row: int) -> JudgedRows:
        """Leave out all rows but one."""
        own = slice(row, row + 1)
        return JudgedRows(
            self.seats[own],
            self.read[own],
            self.in_forward[own],
            self.known[own],
            self.newest[own],
            self.blocks[own],
            self.block_size,
        )

    def slots(self, positions: Tensor) -> Tensor:
        """Return where positions [rows, n] are cached, [rows, n] int64."""
        block = (positions // self.block_size).clamp(0, self.blocks.shape[1] - 1)
        return self.blocks.gather(1, block).long() * self.block_size + positions % self.block_size


class RowJudge:
    """Judges rows by seat.

    Args:
        n_seats: Seats.
        monitor: How scores become a statistic.
        texts: What tripped rows say.
        signals: What ends rows.
        device: Where scores lie.

    Attributes:
        threshold: [seats] of the requests.
        tripped_at: [seats] int64, tokens said when the row tripped; -1 before.
        is_broken: [seats] bool, a position had no score, an old one or that of another token.
        state: What the monitor knows of each seat.
        consumed: [seats] on the host, positions passed: the next one that is judged.
        n_scores: [seats] on the host, scores consumed.
    """

    def __init__(
        self,
        n_seats: int,
        *,
        monitor: MonitorConfig,
        texts: CannedTexts,
        signals: SignalIds,
        device: torch.device,
    ) -> None:
        self._monitor = RiskMonitor(monitor, 0.0)
        # Written in place, so that no two fields may share their memory.
        self.state = MonitorState(*(f.clone() for f in self._monitor.start(n_seats, device)))
        self._fresh = self._monitor.start(1, device)
        nothing = torch.full((n_seats,), NOTHING, dtype=torch.int64, device=device)
        self.threshold = torch.full((n_seats,), torch.inf, device=device)
        self.tripped_at, self._due = nothing, nothing.clone()
        self._script, self._cap = nothing.clone(), nothing.clone()
        self._protects = torch.zeros(n_seats, dtype=torch.bool, device=device)
        self._speaks = self._protects.clone()
        self.is_broken = self._protects.clone()
        self.consumed = np.zeros(n_seats, dtype=np.int64)
        self.n_scores = np.zeros(n_seats, dtype=np.int64)
        self._prompt_tokens = np.zeros(n_seats, dtype=np.int64)
        self._signals, self._device = signals, device
        self._reserved = torch.tensor((signals.redirected, signals.capped), device=device)
        # At the start of a turn, behind words that stand, and for a row that only ends.
        scripts = (texts.refusal, texts.refusal_after, ())
        longest = 1 + max(map(len, scripts))
        self._scripts = torch.full((3, longest), signals.redirected, device=device)
        for i, ids in enumerate(scripts):
            self._scripts[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64, device=device)

    @property
    def longest_script(self) -> int:
        """Count the ids of the longest refusal, its end included."""
        return int(self._scripts.shape[1])

    def seat(self, index: int, terms: RowTerms) -> None:
        """Begin a request that nothing is known of."""
        for held, fresh in zip(self.state, self._fresh, strict=True):
            held[index] = fresh[0]
        self.threshold[index] = terms.threshold
        self._cap[index] = terms.cap
        self._protects[index] = terms.policy.protects
        self._speaks[index] = terms.policy.rule.says == "refusal"
        for one in (self.tripped_at, self._due, self._script):
            one[index] = NOTHING
        self.is_broken[index] = False
        self.consumed[index] = terms.watched_from
        self.n_scores[index] = 0
        self._prompt_tokens[index] = terms.prompt_tokens

    def close(self, index: int) -> None:
        """Let a request end at its next token: it comes back and nothing is known of it."""
        self.is_broken[index] = True

    def step(self, rows: JudgedRows, scores: ScoreSlots, tokens: Tensor) -> Tensor:
        """Judge what a forward has read.

        Args:
            rows: Of the batch.
            scores: Of the engine.
            tokens: [rows, n] ids at the positions from `consumed` on, as `due_positions` names
                them.

        Returns:
            [rows] int64 the id that each must say now; `NOTHING`: it chooses for itself.
        """
        counts = self.due_positions(rows)
        seats = torch.from_numpy(rows.seats).to(self._device)
        self._consume(rows, counts, seats, scores, tokens)
        is_whole = torch.from_numpy(rows.is_whole).to(self._device)
        # A row that chooses must have had a score of this very forward.
        has_no_beat = torch.from_numpy(rows.is_whole & (counts == 0)).to(self._device)
        said = torch.from_numpy(rows.known - self._prompt_tokens[rows.seats]).to(self._device)
        due, tripped_at = self._due[seats], self.tripped_at[seats]
        is_lost = (due != NOTHING) & (rows.newest != due) & is_whole
        broken = self.is_broken[seats] | has_no_beat | is_lost
        alarm = self.state.statistic[seats] > self.threshold[seats]
        stops = (alarm | ~self.state.finite[seats] | broken) & is_whole & self._protects[seats]
        newly = stops & (tripped_at == NOTHING)
        tripped_at = torch.where(newly, said, tripped_at)
        first = torch.where(self._speaks[seats], (said > 0).long(), 2)
        script = torch.where(newly, first, self._script[seats])
        # A forced id that did not arrive: nothing more is said.
        script = torch.where(is_lost & self._protects[seats], 2, script)
        place = (said - tripped_at).clamp(0, self.longest_script - 1)
        forced = torch.where(
            tripped_at == NOTHING, NOTHING, self._scripts[script.clamp_min(0), place]
        )
        is_capped = (tripped_at == NOTHING) & (said >= self._cap[seats])
        forced = torch.where(is_capped, self._signals.capped, forced)
        forced = torch.where(is_whole, forced, NOTHING)
        self.tripped_at[seats], self._script[seats] = tripped_at, script
        self._due[seats] = torch.where(is_whole, forced, due)
        self.is_broken[seats] = broken
        return forced

    def force(self, logits: Tensor, forced: Tensor) -> Tensor:
        """Force ids in place: 0 for one, -inf for all others.

        Args:
            logits: [rows, vocab] float32. Of rows that choose for themselves only those of the
                signals change: the model does not choose them.
            forced: [rows] int64, as `step` returns them.

        Returns:
            `logits`.
        """
        logits.index_fill_(1, self._reserved, -torch.inf)
        is_forced = forced != NOTHING
        if logits.is_cpu and not bool(is_forced.any()):
            return logits
        ids = forced.clamp_min(0)[:, None]
        logits.masked_fill_(is_forced[:, None], -torch.inf)
        chosen = torch.where(is_forced[:, None], 0.0, logits.gather(1, ids))
        return logits.scatter_(1, ids, chosen)

    def due_positions(self, rows: JudgedRows) -> Counts:
        """Count, for each row, the positions that are to be judged now."""
        counts: Counts = np.clip(rows.read - self.consumed[rows.seats], 0, None)
        return counts

    def _consume(
        self, rows: JudgedRows, counts: Counts, seats: Tensor, scores: ScoreSlots, tokens: Tensor
    ) -> None:
        width = int(counts.max(initial=0))
        if width == 0:
            return
        first = torch.from_numpy(self.consumed[rows.seats]).to(self._device)
        begun = torch.from_numpy(rows.read - rows.in_forward).to(self._device)
        positions = first[:, None] + torch.arange(width, device=self._device)
        is_due = positions < torch.from_numpy(rows.read).to(self._device)[:, None]
        found, belongs = scores.read(
            rows.slots(positions), tokens, positions, positions >= begun[:, None]
        )
        state = MonitorState(*(field[seats] for field in self.state))
        for i in range(width):
            state = self._monitor.step(state, found[:, i], is_due[:, i])
        for held, new in zip(self.state, state, strict=True):
            held[seats] = new
        self.is_broken[seats] |= ~(belongs | ~is_due).all(1)
        self.consumed[rows.seats] += counts
        self.n_scores[rows.seats] += counts
