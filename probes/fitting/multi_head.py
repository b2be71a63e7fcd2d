"""Several heads in one probe: fitted apart, on sites of their own, read with one product.

Knows how fitted probes are joined and how categories become heads. Does not know how one
head is fitted, or how a monitor joins what heads say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from probes.activations.features import ResponseFeatures, union_of_sites
from probes.fitting.interface import FitSettings, FittedProbe
from probes.fitting.registry import fitter_for, require_abilities
from safe_decode.errors import ConfigurationError

__all__ = ["fit_heads", "stacked"]


def fit_heads(
    features: ResponseFeatures,
    harmful: Sequence[bool],
    categories: Sequence[str | None],
    config: FitSettings,
    *,
    groups: Sequence[str] | None = None,
    least: int = 50,
) -> FittedProbe:
    """Fit a head for all harm, and one for each category of it against all harmless responses.

    Args:
        features: Of responses.
        harmful: One label a response.
        categories: Of each response; only those of harmful ones are used.
        config: How each head is fitted.
        groups: Of each response; see `Fitter.fit`.
        least: Harmful responses a category needs for a head of its own.

    Raises:
        ConfigurationError: The kind joins no heads.
    """
    require_abilities((config,), ("heads",))
    fits = {"harm": fitter_for(config).fit(features, harmful, groups=groups)}
    named = zip(harmful, categories, strict=True)
    counts = Counter(name for label, name in named if label and name is not None)
    for name in sorted(name for name, count in counts.items() if count >= least):
        rows = [row for row, label in enumerate(harmful) if not label or categories[row] == name]
        labels = [harmful[row] for row in rows]
        own = None if groups is None else [groups[row] for row in rows]
        fits[f"harm:{name}"] = fitter_for(config).fit(features.take(rows), labels, groups=own)
    return stacked(fits)


def stacked(fits: Mapping[str, FittedProbe]) -> FittedProbe:
    """Join probes of one head each into one probe over the union of their sites.

    Raises:
        ConfigurationError: No probe, one that has several heads already, or probes of several
            kinds or of one that is not joined.
    """
    if not fits or any(len(one.probe.heads) != 1 for one in fits.values()):
        raise ConfigurationError("fits must hold at least one probe, of one head each.")
    kinds = {one.config.kind for one in fits.values()}
    if len(kinds) > 1:
        raise ConfigurationError(f"fits hold the kinds {sorted(kinds)}; join probes of one kind.")
    sites = union_of_sites(one.probe.sites for one in fits.values())
    first = next(iter(fits.values()))
    probe = fitter_for(first.config).joined(sites, {name: one.probe for name, one in fits.items()})
    return FittedProbe(
        probe,
        tuple(one.benign_mean[0] for one in fits.values()),
        first.config,
        min(one.dead_features for one in fits.values()),
        all(one.converged for one in fits.values()),
    )
