"""What one session has heard of the forwards of its model, and the count of it.

Knows sites and the pieces of activations that arrive at them. Does not know models,
hooks or threads: one session is driven by one context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_decode.activations.compiled.buffers import ActivationBuffers
from safe_decode.activations.pieces import Piece, by_forward, site_name
from safe_decode.activations.site import Site
from safe_decode.errors import BeatError, ConfigurationError

__all__ = ["ForwardRecorder"]


class ForwardRecorder:
    """The features of the forwards since the last `take`.

    Made by `ActivationTap.listening`, not by users.

    Args:
        sites: In the order of `sorted_sites`.
        registers: What compiled graphs leave; None: every forward runs eagerly.
    """

    def __init__(self, sites: tuple[Site, ...], registers: ActivationBuffers | None = None) -> None:
        """Start with nothing heard."""
        self._registers = registers
        self._sites = sites
        self._keep: int | None = 1
        self.is_open = True
        self.batch = 0
        self._heard: list[Piece] = []  # since the last take, in the order of arrival
        self._any_compiled = False  # of what was heard since the last take

    @property
    def forwards(self) -> int:
        """Complete forwards since the last `take`: every site has fired."""
        self._hear_compiled()
        order = [index for index, _, _ in self._heard]
        return min(order.count(index) for index in range(len(self._sites)))

    @property
    def positions(self) -> int:
        """Positions that passed since the last `take`, kept or not, as the last site saw them."""
        self._hear_compiled()
        last = len(self._sites) - 1
        return sum(passed for index, _, passed in self._heard if index == last)

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
            BeatError: No forward passed, the sites fired unequally often, or a compiled graph
                ran more often than it was read. What was heard is forgotten.
        """
        self._hear_compiled()
        heard, self._heard = self._heard, []
        steps = [self._joined(pieces) for pieces in by_forward(self._sites, heard)]
        features = steps[0] if len(steps) == 1 else self._in_order(steps)
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

    def hear(self, index: int, hidden: Tensor, channels: Tensor | None) -> None:
        """Copy what `keep_last` asks for of one site's channels.

        Args:
            index: Of the site.
            hidden: [batch, seq, width], not changed.
            channels: [n] long on the same device; None: all.
        """
        kept = self._kept(hidden)
        copied = (
            kept.clone(memory_format=torch.contiguous_format)
            if channels is None
            else kept.index_select(2, channels)
        )
        self._heard.append((index, copied, hidden.shape[1]))

    def _hear_compiled(self) -> None:
        if self._registers is None or not self.is_open:
            return
        for index, hidden in self._registers.taken():
            self._any_compiled = True
            self._heard.append((index, self._kept(hidden.detach()), hidden.shape[1]))

    def _kept(self, hidden: Tensor) -> Tensor:
        """Cut off the positions that `keep_last` does not ask for."""
        keep = self._keep
        return hidden if keep is None or keep >= hidden.shape[1] else hidden[:, -keep:]

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
        try:
            joined = torch.cat(pieces, dim=-1)  # type: ignore[arg-type]  # any sequence will do
        except RuntimeError:
            joined = self._joined_across_devices(pieces)
        return joined.float()

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

    def _in_order(self, steps: Sequence[Tensor]) -> Tensor:
        try:
            features = torch.cat(steps, dim=1)  # type: ignore[arg-type]  # any sequence will do
        except RuntimeError as error:
            shapes = [tuple(step.shape) for step in steps]
            raise BeatError(
                f"forwards since the last take have shapes {shapes}, wanted one batch size; "
                "take after each forward, or listen in a context of its own."
            ) from error
        return features if self._keep is None else features[:, -self._keep :]
