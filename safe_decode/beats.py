"""What one session has heard of the forwards of its model, and the count of it.

Knows sites and the pieces of activations that arrive at them. Does not know models,
hooks or threads: one session is driven by one context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_decode.errors import BeatError, ConfigurationError
from safe_decode.sites import Site, n_features

__all__ = ["BORROWED_ROWS", "Beats", "site_name"]

BORROWED_ROWS = 8
"""Up to this many rows on the CPU, one joint copy of whole activations at `take` is cheaper
than a copy of the channels at each site; accelerators gain at any number of rows."""
_COPIED = -1
"""In place of a tensor's version: the piece is our own."""


class Beats:
    """The features of the forwards since the last `take`.

    Made by `ActivationTap.listening`, not by users.

    Args:
        sites: In the order of `sorted_sites`.
        gather: [F] long, the channels of all sites in the concatenation of whole
            activations (resid: of the channels alone, which are always copied at the site).
    """

    def __init__(self, sites: tuple[Site, ...], gather: Tensor) -> None:
        """Start with nothing heard."""
        self._sites = sites
        self._gather = gather
        self._n_features = n_features(sites)
        self._in_turn = list(range(len(sites)))
        self._keep: int | None = 1
        self.is_open = True
        self.batch = 0
        self.discard()

    @property
    def forwards(self) -> int:
        """Complete forwards since the last `take`: every site has fired."""
        if self._order == self._in_turn:
            return 1
        return min(self._order.count(index) for index in self._in_turn)

    @property
    def positions(self) -> int:
        """Positions that passed since the last `take`, kept or not, as the last site saw them."""
        last = self._in_turn[-1]
        return sum(n for index, n in zip(self._order, self._passed, strict=True) if index == last)

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
            BeatError: No forward passed, the sites fired unequally often, or the model
                overwrote an activation in place. What was heard is forgotten.
        """
        pieces, order, versions = self._pieces, self._order, self._versions
        self.discard()
        for piece, version in zip(pieces, versions, strict=True):
            if version != _COPIED and piece._version != version:
                raise BeatError(
                    "an activation was overwritten in place after it passed its site, wanted it "
                    "unchanged until the forward ends; this model needs resid sites."
                )
        if order == self._in_turn:
            return self._joined(pieces)
        return self._in_order(_by_forward(self._sites, pieces, order))

    def discard(self) -> None:
        """Forget what was heard since the last take, complete or not."""
        # Parallel lists, one entry a piece in the order of arrival: the hot path appends and
        # nothing else.
        self._pieces: list[Tensor] = []
        self._order: list[int] = []
        self._versions: list[int] = []
        self._passed: list[int] = []

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
        if hidden.size(0) > BORROWED_ROWS and hidden.is_cpu:
            return False
        self._pieces.append(hidden)
        self._order.append(index)
        self._versions.append(hidden._version)
        self._passed.append(1)
        return True

    def copy(self, index: int, hidden: Tensor, channels: Tensor) -> None:
        """Copy what `keep_last` asks for of one site's channels.

        Args:
            index: Of the site.
            hidden: [batch, seq, width], not changed.
            channels: [n] long on the same device.
        """
        passed = hidden.shape[1]
        if self._keep is not None and self._keep < passed:
            hidden = hidden[:, -self._keep :]
        self._pieces.append(hidden.index_select(2, channels))
        self._order.append(index)
        self._versions.append(_COPIED)
        self._passed.append(passed)

    def _joined(self, pieces: list[Tensor]) -> Tensor:
        try:
            joined = torch.cat(pieces, dim=-1)
        except RuntimeError:
            joined = self._joined_across_devices(pieces)
        if joined.shape[-1] != self._n_features:  # whole activations were borrowed
            if self._gather.device != joined.device:
                self._gather = self._gather.to(joined.device)
            joined = joined.index_select(-1, self._gather)
        return joined.detach().float()

    def _joined_across_devices(self, pieces: list[Tensor]) -> Tensor:
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


def site_name(site: Site) -> str:
    """Name a site for a reader: "mlp of layer 3"."""
    return f"{site.kind} of layer {site.layer}"


def _by_forward(
    sites: Sequence[Site], pieces: list[Tensor], order: list[int]
) -> list[list[Tensor]]:
    heard: list[list[Tensor]] = [[] for _ in sites]
    for piece, index in zip(pieces, order, strict=True):
        heard[index].append(piece)
    counts = [len(of_site) for of_site in heard]
    if not pieces or any(count != counts[0] for count in counts):
        raise BeatError(_unequal(sites, counts))
    return [list(forward) for forward in zip(*heard, strict=True)]


def _unequal(sites: Sequence[Site], counts: Sequence[int]) -> str:
    most = max(counts)
    if most == 0:
        return (
            "no forward passed the tap since the last take, wanted at least one; was the model "
            "called in another context, compiled, or were its hooks removed?"
        )
    short = [f"{site_name(s)} ({c})" for s, c in zip(sites, counts, strict=True) if c != most]
    return (
        f"{', '.join(short)} fired less often than the other sites ({most}) since the last take, "
        "wanted once a forward each; was a hook removed or did a forward fail?"
    )
