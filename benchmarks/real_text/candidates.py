"""Probes to compare: which channels they read, and how they are fitted on window means.

Each is a logistic regression with an offset for each source, which is dropped for scoring; the two
labels of a source weigh the same, and a response weighs the same however many windows it has.

Knows window means, labels and sources. Does not know models or statistics over time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from benchmarks.real_text.parts import StudyRow
from benchmarks.real_text.windows import WindowMeans
from safe_decode.activations.site import Site, SiteKind
from safe_decode.errors import DataError

__all__ = ["TWO_CLASS", "Channels", "Examples", "Solved", "examples_of", "fit", "telling"]

TWO_CLASS = (
    "gptfuzz-labelled",
    "jailbreakeval-saferlhfmini",
    "obfuscated-activations",
    "pku-saferlhf-5k",
)
_CHANNELS_AT_ONCE = 4096
_OFFSET = 10.0  # a source's column is large, so that its weight is hardly penalised

Channels = NDArray[np.int64]
"""Places among all channels of all layers, ascending."""


class Solved(NamedTuple):
    """A linear map on activations.

    Attributes:
        weight: [F] on raw activations, of the channels it reads.
        bias: So that the mean over harmless rows is 0.
    """

    weight: NDArray[np.float64]
    bias: float


@dataclass(frozen=True, eq=False)
class Examples:
    """Window means with what is known of them.

    Attributes:
        shards: Where the values are.
        row: [n] which of the rows.
        begin: [n] first token of the window.
        tokens: [n] of the window.
        harmful: [n] bool.
        source: [n] names.
        share: [n] weight of the window within its response.
    """

    shards: Sequence[WindowMeans]
    row: NDArray[np.int64]
    begin: NDArray[np.int64]
    tokens: NDArray[np.int64]
    harmful: NDArray[np.bool_]
    source: NDArray[np.str_]
    share: NDArray[np.float64]

    def values(self, channels: Channels) -> NDArray[np.float32]:
        """Gather channels of every window, [n, F]."""
        found = np.empty((len(self.row), len(channels)), np.float32)
        place = 0
        for shard in self.shards:
            part = shard.values
            found[place : place + len(part)] = part[:, channels]
            place += len(part)
        return found

    def weights(self, at: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Let both labels of a source weigh the same, and a response 1 on average."""
        weight, source, harmful = self.share[at].copy(), self.source[at], self.harmful[at]
        for name in np.unique(source):
            total = self.share[at][source == name].sum()
            cells = [(source == name) & (harmful == label) for label in (False, True)]
            if all(cell.any() for cell in cells):
                for cell in cells:
                    weight[cell] *= total / (2 * self.share[at][cell].sum())
        return weight


def label_of(row: StudyRow) -> bool:
    """Return a label; unjudged, an answer to a harmful request is harmful unless it refuses."""
    return not row.refusal if row.harmful is None else row.harmful


def source_of(row: StudyRow) -> str:
    """Name the source that a row's offset is of; all answers of the model are one."""
    return "own" if row.source.startswith("own") else row.source


def examples_of(shards: Sequence[WindowMeans], rows: Sequence[StudyRow]) -> Examples:
    """Say of each window what is known of its response."""
    row = np.concatenate([one.row for one in shards])
    count = np.bincount(row, minlength=len(rows))
    return Examples(
        shards,
        row,
        np.concatenate([one.begin for one in shards]),
        np.concatenate([one.tokens for one in shards]),
        np.asarray([label_of(rows[i]) for i in row]),
        np.asarray([source_of(rows[i]) for i in row]),
        1.0 / count[row],
    )


def telling(examples: Examples, at: NDArray[np.bool_], channels: Channels) -> NDArray[np.float64]:
    """Say how far apart the labels lie in each channel, within sources, in standard deviations.

    The mean over the sources that hold both labels of the difference of means over the pooled
    spread, without sign, [F].
    """
    sources = [
        name for name in np.unique(examples.source[at]) if min(_cells(examples, at, name)) >= 2
    ]
    if not sources:
        raise DataError("no source holds both labels; channels cannot be told apart within one.")
    found = np.zeros(len(channels))
    for begin in range(0, len(channels), _CHANNELS_AT_ONCE):
        part = slice(begin, begin + _CHANNELS_AT_ONCE)
        values = examples.values(channels[part])
        for name in sources:
            found[part] += _apart(examples, at & (examples.source == name), values)
    return np.abs(found) / len(sources)


def _cells(examples: Examples, at: NDArray[np.bool_], name: str) -> tuple[int, int]:
    here = at & (examples.source == name)
    return int((here & ~examples.harmful).sum()), int((here & examples.harmful).sum())


def _apart(
    examples: Examples, here: NDArray[np.bool_], values: NDArray[np.float32]
) -> NDArray[np.float64]:
    moments = []
    for label in (False, True):
        cell = here & (examples.harmful == label)
        weight = examples.share[cell] / max(examples.share[cell].sum(), 1e-9)
        own = values[cell].astype(np.float64)
        mean = weight @ own
        moments.append((mean, weight @ np.square(own - mean)))
    (low, low_var), (high, high_var) = moments
    difference: NDArray[np.float64] = (high - low) / np.sqrt((low_var + high_var) / 2 + 1e-12)
    return difference


def fit(
    examples: Examples,
    values: NDArray[np.float32],
    at: NDArray[np.bool_],
    *,
    c: float,
    has_offsets: bool = True,
) -> Solved:
    """Fit on some windows."""
    chosen = values[at]
    mean, std = chosen.mean(axis=0), chosen.std(axis=0)
    floor = max(1e-4 * float(np.median(std)), 1e-7)
    inverse = np.where(std <= floor, 0.0, 1.0 / np.maximum(std, floor)).astype(np.float32)
    standard = (chosen - mean) * inverse
    if has_offsets:
        names = np.unique(examples.source[at])
        offsets = _OFFSET * (examples.source[at][:, None] == names[None]).astype(np.float32)
        standard = np.hstack([standard, offsets])
    model = LogisticRegression(C=c, max_iter=300, tol=1e-3)
    model.fit(standard, examples.harmful[at], sample_weight=examples.weights(at))
    weight = model.coef_[0][: values.shape[1]].astype(np.float64) * inverse
    harmless = at & ~examples.harmful
    share = examples.share[harmless] / examples.share[harmless].sum()
    return Solved(weight, -float(share @ (values[harmless] @ weight)))


def channels_of(sites: Sequence[Site], kinds: Mapping[SiteKind, Sequence[int] | None]) -> Channels:
    """Find the places of whole layers; None stands for every layer."""
    found, place = [], 0
    for site in sites:
        layers = kinds.get(site.kind, ())
        if layers is None or site.layer in layers:
            found.append(np.arange(place, place + len(site.channels)))
        place += len(site.channels)
    return np.concatenate(found).astype(np.int64)


def sites_at(sites: Sequence[Site], channels: Channels) -> tuple[Site, ...]:
    """Name places as sites; columns keep their order."""
    found, place = [], 0
    for site in sites:
        own = channels[(channels >= place) & (channels < place + len(site.channels))] - place
        if len(own):
            found.append(Site(site.layer, site.kind, tuple(int(one) for one in own)))
        place += len(site.channels)
    return tuple(found)
