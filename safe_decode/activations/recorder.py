"""What one session has heard of the forwards of its model, and the count of it.

Knows sites and the pieces of activations that arrive at them. Does not know models,
hooks or threads: one session is driven by one context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_decode.activations.compiled.buffers import ActivationBuffers
from safe_decode.activations.pieces import (
    COPIED,
    Piece,
    by_forward,
    require_unchanged,
    site_name,
)
from safe_decode.activations.site import Site, n_features
from safe_decode.errors import BeatError, ConfigurationError

__all__ = ["WHOLE_ELEMENTS", "ForwardRecorder"]

WHOLE_ELEMENTS = 1 << 17
"""Up to this many numbers on the CPU, one joint copy of whole activations and one selection are
cheaper than a selection at each site; accelerators gain at any size, since they pay a launch."""


class ForwardRecorder:
    """The features of the forwards since the last `take`.

    Made by `ActivationTap.listening`, not by users.

    Args:
        sites: In the order of `sorted_sites`.
        columns: [F] long, the channels of all sites in the concatenation of whole
            activations (resid: of the channels alone, which are always copied at the site).
        n_columns: Width of that concatenation.
        registers: What compiled graphs leave; None: every forward runs eagerly.
    """

    def __init__(
        self,
        sites: tuple[Site, ...],
        columns: Tensor,
        n_columns: int,
        registers: ActivationBuffers | None = None,
    ) -> None:
        """Start with nothing heard."""
        self._registers = registers
        self._sites = sites
        self._columns, self._n_columns = columns, n_columns
        self._channels = [torch.tensor(site.channels) for site in sites]
        self._n_features = n_features(sites)
        self._in_turn = tuple(range(len(sites)))
        self._keep: int | None = 1
        self.is_open = True
        self.batch = 0
        self._heard: list[Piece] = []  # since the last take, in the order of arrival
        self._any_compiled = False  # of what was heard since the last take

    @property
    def forwards(self) -> int:
        """Complete forwards since the last `take`: every site has fired."""
        self._hear_compiled()
        order = [index for index, *_ in self._heard]
        return min(order.count(index) for index in self._in_turn)

    @property
    def positions(self) -> int:
        """Positions that passed since the last `take`, kept or not, as the last site saw them."""
        self._hear_compiled()
        last = self._in_turn[-1]
        return sum(passed for index, *_, passed in self._heard if index == last)

    def keep_last(self, n_positions: int | None) -> None:
        """Say how many trailing positions are kept, from the next forward on.

        The number holds until it is changed. Over several forwards before one `take`
        (a chunked prefill) it counts positions of all of them together.

        Args:
            n_positions: At least 1, or None for every position. 1 at the start.

        Raises:
            ConfigurationError: `n_positions` is below 1.
        """
        if n_positions is not None and n_positions < 1:
            raise ConfigurationError(
                f"n_positions={n_positions} keeps nothing; pass at least 1, or None for all."
            )
        self._keep = n_positions

    def take(self) -> Tensor:
        """Return the features heard since the last take, and forget them.

        Returns:
            [batch, positions, F] float32 on the device of the first site, a fresh tensor
            without gradient. Positions in order, F in the order of `sorted_sites`.

        Raises:
            BeatError: No forward passed, the sites fired unequally often, the model
                overwrote an activation in place, or a compiled graph ran more often than it
                was read. What was heard is forgotten.
        """
        self._hear_compiled()
        heard, self._heard = self._heard, []
        require_unchanged(heard)
        if tuple(index for index, *_ in heard) == self._in_turn:
            features = self._joined([hidden for _, hidden, *_ in heard])
        else:
            features = self._in_order(by_forward(self._sites, heard))
        return self._exact(features) if self._any_compiled else features

    def discard(self) -> None:
        """Forget what was heard since the last take, complete or not."""
        self._heard = []
        if self._registers is not None:
            self._any_compiled = False
            self._registers.discard()

    def close(self) -> None:
        """Forget everything and hear no more."""
        self.is_open = False
        self.discard()

    def borrow(self, index: int, hidden: Tensor) -> bool:
        """Keep one site's whole activation until `take`, where that is cheaper than a copy.

        Args:
            index: Of the site.
            hidden: [batch, seq, width], which the model will not overwrite.

        Returns:
            Whether it was kept. Not for prefill, which would hold the memory; not in
            inference mode, where an overwriting could not be noticed.
        """
        if hidden.size(1) != 1 or hidden.is_inference():
            return False
        # A plain tuple: on the way of every token, the name costs as much as the rest.
        self._heard.append((index, hidden, hidden._version, 1))
        return True

    def copy(self, index: int, hidden: Tensor, channels: Tensor | None) -> None:
        """Copy what `keep_last` asks for of one site's channels.

        Args:
            index: Of the site.
            hidden: [batch, seq, width], not changed.
            channels: [n] long on the same device; None: all.
        """
        passed = hidden.shape[1]
        if self._keep is not None and self._keep < passed:
            hidden = hidden[:, -self._keep :]
        copied = (
            hidden.clone(memory_format=torch.contiguous_format)
            if channels is None
            else hidden.index_select(2, channels)
        )
        self._heard.append((index, copied, COPIED, passed))

    def _hear_compiled(self) -> None:
        if self._registers is None or not self.is_open:
            return
        for index, activation in self._registers.taken():
            self._any_compiled = True
            hidden = activation
            passed = hidden.shape[1]
            if self._keep is not None and self._keep < passed:
                hidden = hidden[:, -self._keep :]
            self._heard.append((index, hidden, COPIED, passed))

    def _exact(self, features: Tensor) -> Tensor:
        """Refuse features of a compiled graph that ran unread; where asking waits, as NaN."""
        assert self._registers is not None
        self._any_compiled = False
        is_exact = self._registers.is_exact()
        if self._waits(is_exact):
            return features.masked_fill(~is_exact.to(features.device), torch.nan)
        if not bool(is_exact):
            raise BeatError(
                "the compiled model ran more than once before one choice, wanted one forward for "
                "each; do not call it while it generates under a guard."
            )
        return features

    @staticmethod
    def _waits(flag: Tensor) -> bool:
        return not flag.is_cpu

    def _joined(self, pieces: Sequence[Tensor]) -> Tensor:
        if pieces[0].is_cpu and pieces[0].shape[0] * self._n_columns > WHOLE_ELEMENTS:
            pieces = self._selected(pieces)
        try:
            joined = torch.cat(pieces, dim=-1)  # type: ignore[arg-type]  # any sequence will do
        except RuntimeError:
            joined = self._joined_across_devices(pieces)
        if joined.shape[-1] != self._n_features:  # whole activations were borrowed
            if self._columns.device != joined.device:
                self._columns = self._columns.to(joined.device)
            joined = joined.index_select(-1, self._columns)
        if joined.requires_grad:
            joined = joined.detach()
        return joined if joined.dtype == torch.float32 else joined.float()

    def _selected(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Select the channels of pieces that were borrowed whole."""
        return [
            piece
            if piece.shape[-1] == len(channels)
            else piece.index_select(-1, channels.to(piece.device))
            for piece, channels in zip(pieces, self._channels, strict=True)
        ]

    def _joined_across_devices(self, pieces: Sequence[Tensor]) -> Tensor:
        try:
            return torch.cat([piece.to(pieces[0].device) for piece in pieces], dim=-1)
        except RuntimeError as error:
            shapes = {
                site_name(site): tuple(piece.shape)
                for site, piece in zip(self._sites, pieces, strict=True)
            }
            raise BeatError(
                f"sites of one forward differ in batch or positions: {shapes}; wanted one "
                "[batch, positions] for all."
            ) from error

    def _in_order(self, forwards: list[list[Tensor]]) -> Tensor:
        steps = [self._joined(pieces) for pieces in forwards]
        try:
            features = torch.cat(steps, dim=1)
        except RuntimeError as error:
            shapes = [tuple(step.shape) for step in steps]
            raise BeatError(
                f"forwards since the last take have shapes {shapes}, wanted one batch size; "
                "take after each forward, or listen in a context of its own."
            ) from error
        return features if self._keep is None else features[:, -self._keep :]
