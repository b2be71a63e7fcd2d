"""Channels located by what they tell about harm, beside those located by their importance.

Of every channel of attention heads and MLP neurons the mean over a response is taken; how far
those of harmful and harmless responses lie apart, within each source of the data, in standard
deviations, is what the channel tells. Differences are averaged over sources before the sign is
dropped, so that a channel which tells one source by its style and another by the opposite is not
chosen. Nothing is kept of a response but sums, so memory does not grow with the rows.

Importance (`probes.location.importance`) asks what the model needs for its refusals; this asks
what can be read from it. A probe that reads these channels reads located units of the model, not
its residual stream.

Knows labelled responses, forwards and sums. Does not know probes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.activations.teacher_forcing import PaddedBatch, encode_response, visit_activations
from probes.data.conversations import Conversation
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site, SiteKind
from safe_decode.errors import ConfigurationError, DataError, NonFiniteError, UnsupportedError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["TellingChannels", "telling_channels"]

_KINDS: tuple[SiteKind, ...] = ("attn", "mlp")
_FEWEST = 8
"""Responses of each label without which a source says nothing of channels."""


@dataclass(frozen=True, eq=False)
class TellingChannels:
    """How well each channel tells harm.

    Attributes:
        sites: Every channel that was looked at.
        apart: [F] difference of means in standard deviations, without sign, in that order.
        sources: Those that hold both labels, which were averaged over.
        responses: How many were read.
    """

    sites: tuple[Site, ...]
    apart: NDArray[np.float64]
    sources: tuple[str, ...]
    responses: int

    def most(self, count: int) -> tuple[Site, ...]:
        """Name the channels that tell most.

        Raises:
            ConfigurationError: `count` is below 1.
        """
        if count < 1:
            raise ConfigurationError(f"count={count} names no channel; pass at least 1.")
        chosen = np.zeros(len(self.apart), dtype=np.bool_)
        chosen[np.argsort(-self.apart, kind="stable")[:count]] = True
        found, place = [], 0
        for site in self.sites:
            own = np.flatnonzero(chosen[place : place + len(site.channels)])
            place += len(site.channels)
            if len(own):
                channels = tuple(site.channels[int(one)] for one in own)
                found.append(Site(site.layer, site.kind, channels))
        return tuple(found)


def telling_channels(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    sources: Sequence[str],
    *,
    tokens: int = 128,
    most_rows: int = 2000,
) -> TellingChannels:
    """Look at every channel of heads and neurons.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        rows: Judged responses, of the fit split.
        sources: Of each row; labels are told apart within one.
        tokens: Content tokens of each response that are read, at most.
        most_rows: Rows that are read at most, drawn by a hash of their group.

    Raises:
        DataError: No source holds enough of both labels.
        NonFiniteError: An activation is NaN or infinite.
        UnsupportedError: The model has neither heads nor neurons that can be read.
    """
    cells = _cells(rows, sources, _drawn(rows, most_rows))
    keys = sorted(cells)
    both = tuple(sorted({name for name, _ in keys}))
    read = [place for key in keys for place in cells[key]]
    cell_of = torch.tensor([number for number, key in enumerate(keys) for _ in cells[key]])
    encoded = [encode_response(tokenizer, rows[place]) for place in read]
    encoded = [one._replace(ids=one.ids[: one.turn_start + tokens]) for one in encoded]
    sums = _Sums(_every_site(model), len(keys))

    def visit(batch: PaddedBatch, site: int, values: Tensor) -> None:
        means = torch.stack(
            [
                values[i, -max(n - 1, 1) :].mean(dim=0, dtype=torch.float32)
                for i, n in enumerate(batch.n_scores)
            ]
        )
        sums.add(site, cell_of[list(batch.rows)], means.cpu())

    visit_activations(model, sums.sites, encoded, visit, description="reading every channel")
    counts = np.bincount(cell_of.numpy(), minlength=len(keys))
    mean, variance = sums.moments(counts)
    apart = np.zeros(mean.shape[1])
    for name in both:
        low, high = keys.index((name, False)), keys.index((name, True))
        spread = np.sqrt((variance[low] + variance[high]) / 2)
        floor = 1e-4 * float(np.median(spread)) + 1e-12
        apart += np.where(spread > floor, (mean[high] - mean[low]) / np.maximum(spread, floor), 0)
    return TellingChannels(sums.sites, np.abs(apart) / len(both), both, len(read))


def _cells(
    rows: Sequence[Conversation], sources: Sequence[str], chosen: Sequence[int]
) -> dict[tuple[str, bool], list[int]]:
    """Sort rows by source and label; sources with too few of either are left out."""
    cells: dict[tuple[str, bool], list[int]] = {}
    for place in chosen:
        key = (sources[place], rows[place].response_harmful is True)
        cells.setdefault(key, []).append(place)
    small = {
        name
        for name, _ in cells
        if min(len(cells.get((name, label), ())) for label in (False, True)) < _FEWEST
    }
    found = {key: places for key, places in cells.items() if key[0] not in small}
    if not found:
        raise DataError(
            f"none of the sources {sorted(set(sources))} holds {_FEWEST} harmful and {_FEWEST} "
            "harmless responses; give such a source, or read the residual stream."
        )
    return found


class _Sums:
    """Means of responses, summed by cell: of themselves and of their squares."""

    def __init__(self, sites: tuple[Site, ...], n_cells: int) -> None:
        self.sites = sites
        self._first: list[Tensor | None] = [None] * len(sites)
        self._sums = [
            torch.zeros(2, n_cells, len(site.channels), dtype=torch.float64) for site in sites
        ]

    def add(self, site: int, cells: Tensor, means: Tensor) -> None:
        """Add the means of some responses, [batch, n]."""
        if not bool(torch.isfinite(means).all()):
            raise NonFiniteError("an activation is NaN or infinite; load the model in float32.")
        first = self._first[site]
        if first is None:  # squares around a value near the mean stay exact
            first = self._first[site] = means.mean(dim=0).double()
        away = means.double() - first
        self._sums[site][0].index_add_(0, cells, away)
        self._sums[site][1].index_add_(0, cells, away.square())

    def moments(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return mean and variance of each cell, [cells, F] each."""
        n = counts[:, None]
        means, variances = [], []
        for first, (total, squares) in zip(self._first, self._sums, strict=True):
            assert first is not None
            away = total.numpy() / n
            means.append(first.numpy() + away)
            variances.append(np.maximum(squares.numpy() / n - away**2, 0.0))
        return np.concatenate(means, axis=1), np.concatenate(variances, axis=1)


def _every_site(model: CausalLM) -> tuple[Site, ...]:
    """Name the heads and neurons that can be read; a block without a kind is passed over."""
    anatomy, found, why = anatomy_of(model), [], ""
    for layer in range(len(anatomy.blocks)):
        for kind in _KINDS:
            try:
                found.append(Site(layer, kind, tuple(range(anatomy.width(layer, kind)))))
            except UnsupportedError as error:
                why = str(error)
    if not found:
        raise UnsupportedError(why)
    return tuple(sorted(found))


def _drawn(rows: Sequence[Conversation], most: int) -> list[int]:
    def order(place: int) -> tuple[bytes, int]:
        return hashlib.blake2b(rows[place].group.encode(), digest_size=8).digest(), place

    return sorted(sorted(range(len(rows)), key=order)[:most])
