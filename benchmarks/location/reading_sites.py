"""The places a probe might read, with equal numbers of features.

Knows located units, lots and channels. Does not know how a probe is fitted. Sets of channels
are drawn from one harvest of every unit channel and every residual channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from probes.activations.features import ResponseFeatures
from probes.location.locate import all_unit_sites
from probes.location.units import CATEGORIES, UnitSet, sites_of
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site, n_features, sorted_sites
from safe_decode.typing import CausalLM

__all__ = ["Place", "all_sites", "channels_of", "matched_channels", "places"]


@dataclass(frozen=True)
class Place:
    """A set of channels that a probe might read.

    Attributes:
        name: What it is.
        family: `random` for the lots that location is compared with, else the name.
        sites: Where.
    """

    name: str
    family: str
    sites: tuple[Site, ...]


def all_sites(model: CausalLM) -> tuple[Site, ...]:
    """Name every channel of a unit and of the residual stream."""
    anatomy = anatomy_of(model)
    residual = [
        Site(layer, "resid", tuple(range(anatomy.d_model))) for layer in range(len(anatomy.blocks))
    ]
    return sorted_sites((*all_unit_sites(model), *residual))


def places(
    units: UnitSet,
    everything: tuple[Site, ...],
    features: ResponseFeatures,
    harmful: NDArray[np.bool_],
    *,
    count: int,
    draws: int,
    seed: int,
) -> Iterator[Place]:
    """Name the places of one feature count.

    Args:
        units: All units of the model, located.
        everything: From `all_sites`, as harvested.
        features: Of the fit split, at `everything`.
        harmful: Its labels.
        count: Features of each place.
        draws: Random sets.
        seed: Of the lots.
    """
    rng = np.random.default_rng(seed)
    critical = sites_of(units.most_critical(count))
    wanted = n_features(critical)
    yield Place("SCU", "SCU", critical)
    useful = sites_of(_swapped(units).most_critical(count))
    yield Place("UCU", "UCU", useful)
    names = channels_of(everything)
    unit_rows = np.flatnonzero([kind != "resid" for _, kind, _ in names])
    apart = _mean_difference(features, harmful)[unit_rows]
    best = unit_rows[np.argsort(-apart, kind="stable")[:wanted]]
    yield Place("top |mean difference| / sd", "top |mean difference| / sd", _sites(names, best))
    for number in range(draws):
        yield Place(f"random {number}", "random", matched_channels(critical, everything, rng))
    layers = sorted({layer for layer, _, _ in names})
    for layer in layers:
        here = [i for i, (at, kind, _) in enumerate(names) if kind == "resid" and at == layer]
        some = rng.choice(here, min(wanted, len(here)), replace=False)
        yield Place(f"residual, layer {layer}", "residual, one layer", _sites(names, some))
    residual = [i for i, (_, kind, _) in enumerate(names) if kind == "resid"]
    some = rng.choice(residual, min(wanted, len(residual)), replace=False)
    yield Place("residual, all layers", "residual, all layers", _sites(names, some))
    bottom = [i for i, (at, kind, _) in enumerate(names) if at == 0 and kind != "resid"]
    some = rng.choice(bottom, min(wanted, len(bottom)), replace=False)
    yield Place("layer 0", "layer 0", _sites(names, some))


def matched_channels(
    sites: tuple[Site, ...], everything: tuple[Site, ...], rng: np.random.Generator
) -> tuple[Site, ...]:
    """Draw as many channels of each layer and kind, none of them in `sites` where others are."""
    there = {(site.layer, site.kind): site for site in everything}
    drawn = []
    for site in sites:
        pool = np.asarray(there[site.layer, site.kind].channels)
        others = np.setdiff1d(pool, site.channels)
        size = len(site.channels)
        picked = rng.choice(others if len(others) >= size else pool, size, replace=False)
        drawn.append(Site(site.layer, site.kind, tuple(sorted(int(c) for c in picked))))
    return sorted_sites(drawn)


def channels_of(sites: tuple[Site, ...]) -> list[tuple[int, str, int]]:
    """Name the channels in the order of their columns."""
    return [
        (site.layer, site.kind, channel)
        for site in sorted_sites(sites)
        for channel in site.channels
    ]


def _swapped(units: UnitSet) -> UnitSet:
    """Exchange the scores, so that the most critical are the most useful."""
    plain = units.category.copy()
    plain[plain == CATEGORIES.index("UCU")] = CATEGORIES.index("SCU")
    return replace(units, i_s=units.i_u, i_u=units.i_s, category=plain)


def _sites(names: list[tuple[int, str, int]], rows: Iterable[int]) -> tuple[Site, ...]:
    found: dict[tuple[int, str], list[int]] = {}
    for row in rows:
        layer, kind, channel = names[int(row)]
        found.setdefault((layer, kind), []).append(channel)
    return sorted_sites(
        Site(layer, kind, tuple(sorted(channels)))  # type: ignore[arg-type]
        for (layer, kind), channels in found.items()
    )


def _mean_difference(features: ResponseFeatures, harmful: NDArray[np.bool_]) -> NDArray[np.float64]:
    means = np.stack([np.asarray(v, dtype=np.float32).mean(axis=0) for v in features.responses])
    gap = means[harmful].mean(axis=0) - means[~harmful].mean(axis=0)
    spread = np.sqrt(means[harmful].var(axis=0) / 2 + means[~harmful].var(axis=0) / 2)
    # A channel that never moves tells nothing.
    apart = np.divide(np.abs(gap), spread, out=np.zeros_like(gap), where=spread > 0)
    return np.asarray(apart, dtype=np.float64)
