"""What holds for the rows of a session while none of them leaves, joins or moves.

Knows thresholds, policies and what of a prompt is judged. Does not know scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from safe_decode.errors import ConfigurationError
from safe_decode.host_copies import sent
from safe_decode.monitor.monitor import MonitorConfig, MonitorState, RiskMonitor
from safe_decode.policy.policy import Policy
from safe_decode.session.records import SessionRow

__all__ = ["Roster"]


@dataclass(frozen=True)
class Roster:
    """The rows of one batch, in order.

    Attributes:
        rows: What holds for each.
        monitor: With their thresholds.
        device: Where their state lives.
        protected: [batch] bool, rows that are protected; None where all rows agree, so that
            they pay nothing for rows that differ.
    """

    rows: tuple[SessionRow, ...]
    monitor: RiskMonitor
    device: torch.device
    protected: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[SessionRow], config: MonitorConfig, device: torch.device) -> Roster:
        """Take the rows of a batch.

        Raises:
            ConfigurationError: What happens to errors differs between them.
        """
        if len({row.policy.on_error for row in rows}) > 1:
            raise ConfigurationError("on_error differs between rows; pass one value for the batch.")
        protects = [row.policy.protects for row in rows]
        protected = sent(protects, device) if len(set(protects)) > 1 else None
        thresholds = [row.threshold for row in rows]
        is_one = len(set(thresholds)) == 1
        monitor = RiskMonitor(config, thresholds[0] if is_one else torch.tensor(thresholds))
        return cls(tuple(rows), monitor, device, protected)

    def start(self) -> MonitorState:
        """Begin every row where it asks to begin."""
        fresh = self.monitor.start(len(self.rows), self.device)
        return fresh.with_rows({i: r.state for i, r in enumerate(self.rows) if r.state is not None})

    def begun(self) -> list[int]:
        """Count, for each row, the scores it has when it begins; waits for no fresh row."""
        return [0 if r.state is None else int(r.state.step[0]) for r in self.rows]

    @cached_property
    def scanned(self) -> tuple[int, ...]:
        """For each row, how many trailing positions of its prompt are judged."""
        return tuple(row.scanned for row in self.rows)

    @cached_property
    def policies(self) -> tuple[Policy, ...]:
        """For each row, what a trip leads to."""
        return tuple(row.policy for row in self.rows)

    @cached_property
    def protects(self) -> bool:
        """Say whether any row is protected."""
        return any(row.policy.protects for row in self.rows)

    @cached_property
    def closes(self) -> bool:
        """Say whether a row whose guard fails is closed."""
        return self.protects and self.rows[0].policy.on_error == "close"

    @cached_property
    def n_snapshots(self) -> int:
        """Count the states that are kept to go back to."""
        return max(row.policy.holdback_tokens for row in self.rows) + 1
