"""What a recipe tries: sites, ways of fitting, statistics.

Knows names and what they stand for. Does not know rows, or which try is best.
"""

from __future__ import annotations

import numpy as np

from probes.building.recipe import BuildRecipe, ProbeReading
from probes.fitting.interface import FitSettings
from probes.fitting.search import fits_of
from probes.fitting.statistics import statistics_of
from probes.recipes import reading as recipe_reading
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site, sorted_sites
from safe_decode.loading import Loaded

__all__ = ["fits_for", "require_tries", "site_candidates", "telling_counts"]

_LAYERS = 4
_FIRST_SHARE, _LAST_SHARE = 1 / 3, 5 / 6
"""Of the depth: earlier layers hold words rather than meaning, the last ones the next token."""


def fits_for(reading: ProbeReading) -> tuple[FitSettings, ...]:
    """Name the ways of fitting that a recipe tries.

    Raises:
        ConfigurationError: There is no such kind of probe, or it has no such method or penalty.
    """
    return fits_of(
        None if reading.methods is None else list(reading.methods), reading.c, reading.probe
    )


def require_tries(recipe: BuildRecipe) -> None:
    """Check, before a model is loaded, that everything a recipe tries is there.

    Raises:
        ConfigurationError: There is no such probe, method, penalty or statistic.
    """
    fits_for(recipe.reading)
    statistics_of(list(recipe.reading.statistics) or None)


def site_candidates(own: Loaded, recipe: BuildRecipe) -> dict[str, tuple[Site, ...]]:
    """Name the sets of residual layers that are tried: each layer alone, and all together."""
    layers, width = _layers(own, recipe), tuple(range(anatomy_of(own.model).d_model))
    found: dict[str, tuple[Site, ...]] = {
        f"residual-{layer}": (Site(layer, "resid", width),) for layer in layers
    }
    if len(layers) > 1:
        name = "residual-" + ",".join(map(str, layers))
        found[name] = sorted_sites(Site(layer, "resid", width) for layer in layers)
    return found


def telling_counts(own: Loaded, recipe: BuildRecipe) -> tuple[int, ...]:
    """Say how many of the channels that tell most about harm are read: as the recipe names them."""
    if recipe.reading.telling is not None:
        return recipe.reading.telling
    return recipe_reading.telling_counts(own.model, len(_layers(own, recipe)))


def _layers(own: Loaded, recipe: BuildRecipe) -> tuple[int, ...]:
    if recipe.reading.layers is not None:
        return recipe.reading.layers
    n_layers = len(anatomy_of(own.model).blocks)
    spread = np.linspace(n_layers * _FIRST_SHARE, n_layers * _LAST_SHARE, _LAYERS)
    return tuple(sorted({min(round(float(x)), n_layers - 1) for x in spread}))
