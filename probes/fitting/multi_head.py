"""Several heads in one probe: fitted apart, on sites of their own, read with one product.

Knows how fitted probes are joined and how categories become heads. Does not know how one
head is fitted, or how a monitor joins what heads say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from probes.activations.features import ResponseFeatures, columns_of, union_of_sites
from probes.fitting.linear import FitConfig, FittedProbe, LinearProbeFitter
from safe_decode.activations.site import n_features
from safe_decode.errors import ConfigurationError
from safe_decode.probe.linear import LinearProbe

__all__ = ["fit_heads", "stacked"]


def fit_heads(
    features: ResponseFeatures,
    harmful: Sequence[bool],
    categories: Sequence[str | None],
    config: FitConfig,
    *,
    least: int = 50,
) -> FittedProbe:
    """Fit a head for all harm, and one for each category of it against all harmless responses.

    Args:
        features: Of responses.
        harmful: One label a response.
        categories: Of each response; only those of harmful ones are used.
        config: How each head is fitted.
        least: Harmful responses a category needs for a head of its own.
    """
    fits = {"harm": LinearProbeFitter(config).fit(features, harmful)}
    named = zip(harmful, categories, strict=True)
    counts = Counter(name for label, name in named if label and name is not None)
    for name in sorted(name for name, count in counts.items() if count >= least):
        rows = [row for row, label in enumerate(harmful) if not label or categories[row] == name]
        labels = [harmful[row] for row in rows]
        fits[f"harm:{name}"] = LinearProbeFitter(config).fit(features.take(rows), labels)
    return stacked(fits)


def stacked(fits: Mapping[str, FittedProbe]) -> FittedProbe:
    """Join probes of one head each into one probe over the union of their sites.

    Raises:
        ConfigurationError: No probe, or one that has several heads already.
    """
    if not fits or any(len(one.probe.heads) != 1 for one in fits.values()):
        raise ConfigurationError("fits must hold at least one probe, of one head each.")
    sites = union_of_sites(one.probe.sites for one in fits.values())
    weight = torch.zeros(n_features(sites), len(fits))
    for head, one in enumerate(fits.values()):
        weight[columns_of(sites, one.probe.sites), head] = one.probe.weight[:, 0]
    first = next(iter(fits.values()))
    bias = torch.cat([one.probe.bias for one in fits.values()])
    return FittedProbe(
        LinearProbe(sites, weight, bias, tuple(fits)),
        tuple(one.benign_mean[0] for one in fits.values()),
        first.config,
        int((weight == 0).all(dim=1).sum()),
        all(one.converged for one in fits.values()),
    )
