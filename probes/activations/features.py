"""Activations of whole responses, and which of them count for which label.

Row h of a response of T content tokens is the score position s_h: s_0 stands at the last
template token, s_{t+1} at content token t. A response that turns harmful at token o is
therefore harmful from s_{o+1} on.

Knows arrays, labels and onsets. Does not know models, files or fitting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_decode.activations.site import Site, n_features, sorted_sites
from safe_decode.errors import ConfigurationError, DataError

__all__ = [
    "BeforeOnset",
    "ResponseFeatures",
    "Segment",
    "columns_of",
    "label_segments",
    "label_spans",
    "union_of_sites",
]

BeforeOnset = Literal["negative", "exclude"]
"""What the positions of a harmful response before its onset teach: that they are harmless,
or nothing."""


@dataclass(frozen=True, eq=False)
class ResponseFeatures:
    """Activations of responses, one array each.

    Attributes:
        sites: Where they were read; columns follow the order of `sorted_sites`.
        responses: [T + 1, F] float16 or float32 each; may be memory-mapped.
        onset_tokens: Content token that begins the first harmful clause, or None.

    Raises:
        ConfigurationError: An array does not fit the sites, or the lists differ in length.
    """

    sites: tuple[Site, ...]
    responses: tuple[NDArray[Any], ...]
    onset_tokens: tuple[int | None, ...]

    def __post_init__(self) -> None:
        width = n_features(self.sites)
        if len(self.responses) != len(self.onset_tokens):
            raise ConfigurationError(
                f"{len(self.responses)} responses have {len(self.onset_tokens)} onsets; "
                "pass one a response, None where unknown."
            )
        for row, values in enumerate(self.responses):
            if values.ndim != 2 or values.shape[1] != width or not len(values):
                raise ConfigurationError(
                    f"response {row} has shape {values.shape}, wanted [T + 1, {width}]."
                )

    def __len__(self) -> int:
        """Count the responses."""
        return len(self.responses)

    def at(self, sites: Sequence[Site]) -> ResponseFeatures:
        """Keep the columns of some sites, which must be among those harvested."""
        columns = columns_of(self.sites, sites)
        if len(columns) == n_features(self.sites):
            return self
        kept = tuple(values[:, columns] for values in self.responses)
        return ResponseFeatures(sorted_sites(sites), kept, self.onset_tokens)

    def take(self, rows: Sequence[int]) -> ResponseFeatures:
        """Keep the responses at the given positions, in that order."""
        return ResponseFeatures(
            self.sites,
            tuple(self.responses[row] for row in rows),
            tuple(self.onset_tokens[row] for row in rows),
        )


class Segment(NamedTuple):
    """A run of positions of one response that share a label.

    Attributes:
        row: Which response.
        start: First position s_h, inclusive.
        stop: Last position s_h, exclusive.
        harmful: The label.
        weight: The segments of one response add to 1.
    """

    row: int
    start: int
    stop: int
    harmful: bool
    weight: float


def columns_of(harvested: Sequence[Site], wanted: Sequence[Site]) -> NDArray[np.intp]:
    """Find the columns of `wanted` among the features of `harvested`.

    Raises:
        ConfigurationError: A wanted channel was not harvested.
    """
    place: dict[tuple[int, str, int], int] = {}
    for site in sorted_sites(harvested):
        for channel in site.channels:
            place[site.layer, site.kind, channel] = len(place)
    keys = [(s.layer, s.kind, channel) for s in sorted_sites(wanted) for channel in s.channels]
    missing = [key for key in keys if key not in place]
    if missing:
        layer, kind, channel = missing[0]
        raise ConfigurationError(
            f"channel {channel} of {kind} in layer {layer} was not harvested "
            f"({len(missing)} are missing); harvest it or pass sites among those harvested."
        )
    return np.asarray([place[key] for key in keys], dtype=np.intp)


def union_of_sites(site_sets: Iterable[Sequence[Site]]) -> tuple[Site, ...]:
    """Name every channel that stands in at least one of the sets."""
    channels: dict[tuple[int, Any], set[int]] = {}
    for sites in site_sets:
        for site in sites:
            channels.setdefault((site.layer, site.kind), set()).update(site.channels)
    return sorted_sites(
        Site(layer, kind, tuple(sorted(found))) for (layer, kind), found in channels.items()
    )


def label_segments(
    features: ResponseFeatures,
    harmful: Sequence[bool],
    *,
    before_onset: BeforeOnset = "negative",
) -> list[Segment]:
    """Say which positions of each response teach which label; see `label_spans`."""
    lengths = [len(values) for values in features.responses]
    return label_spans(lengths, features.onset_tokens, harmful, before_onset=before_onset)


def label_spans(
    n_scores: Sequence[int],
    onset_tokens: Sequence[int | None],
    harmful: Sequence[bool],
    *,
    before_onset: BeforeOnset = "negative",
) -> list[Segment]:
    """Say which positions of each response teach which label.

    A harmless response is negative from s_0 on. A harmful one is positive from the score
    that judges its onset token; where the onset is unknown, from s_1 on, and s_0, at which
    nothing has been said yet, teaches nothing.

    Args:
        n_scores: T + 1 of each response.
        onset_tokens: Onset of each, or None.
        harmful: One label a response.
        before_onset: See `BeforeOnset`.

    Raises:
        ConfigurationError: Not one label a response, or an onset outside its response.
        DataError: Every label is the same, so there is nothing to tell apart.
    """
    if len(harmful) != len(n_scores):
        raise ConfigurationError(
            f"harmful has {len(harmful)} labels for {len(n_scores)} responses; pass one each."
        )
    segments: list[Segment] = []
    for row, (label, stop, onset) in enumerate(zip(harmful, n_scores, onset_tokens, strict=True)):
        if not label:
            segments.append(Segment(row, 0, stop, False, 1.0))
            continue
        first = 1 if onset is None else onset + 1
        if first >= stop:
            raise ConfigurationError(
                f"response {row} is harmful from token {first - 1} but has {stop - 1} tokens; "
                "drop it, or correct its onset."
            )
        negative = onset is not None and before_onset == "negative"
        if negative:
            segments.append(Segment(row, 0, first, False, 0.5))
        segments.append(Segment(row, first, stop, True, 0.5 if negative else 1.0))
    if len({segment.harmful for segment in segments}) < 2:
        raise DataError(
            f"all {len(n_scores)} responses are {'harmful' if any(harmful) else 'harmless'}; "
            "give both kinds."
        )
    return segments
