"""The settings of freezing by name, and the same with units drawn by lot.

Knows which units a setting means. Does not know how weights are held.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from probes.finetuning.freeze import UnitFreeze
from probes.finetuning.located_freezes import RedundantUnitBudget, SafetyFreeze, safety_setting
from probes.location.random_sets import matched_draws
from probes.location.units import CATEGORIES, UnitSet
from safe_decode.errors import ConfigurationError

__all__ = ["Setting", "freeze_of", "units_of"]

Setting = Literal["scu", "i", "ii", "redundant"]
"""scu: safety-critical units are frozen. i: and the top 6 % of the complex ones. ii: and all
complex ones. redundant: all is frozen but the redundant units."""


def units_of(units: UnitSet, setting: Setting, *, random_seed: int | None = None) -> UnitSet:
    """Return the units that a setting names: those frozen, or those trained for `redundant`.

    Args:
        units: As located on the model, all of its units.
        setting: See `Setting`.
        random_seed: Draw as many units of each layer and kind by lot instead. Where the set
            is most of a layer, the draw must fall on many of the same units.

    Raises:
        ConfigurationError: Another setting, or it names no unit.
    """
    if setting not in get_args(Setting):
        raise ConfigurationError(f"setting={setting!r} is not one of {get_args(Setting)}.")
    if setting == "redundant":
        named = RedundantUnitBudget(units).units
    elif setting == "scu":
        named = SafetyFreeze(units).units
    else:
        named = safety_setting(units, setting).units
    if random_seed is None:
        return named
    chosen = np.isin(_names(units), _names(named))
    marked = np.where(chosen, CATEGORIES.index("SCU"), CATEGORIES.index("CU"))
    lot = replace(units, category=marked.astype(np.uint8))
    fresh = (~chosen).sum() >= chosen.sum()
    if fresh:
        return matched_draws(lot, count=1, seed=random_seed)[0]
    # More than half of the model: units are drawn from all, located ones among them.
    rng = np.random.default_rng(random_seed)
    picked = np.zeros(len(units), dtype=bool)
    strata = units.layer.astype(np.int64) * 2 + units.kind
    for name in np.unique(strata):
        pool = np.flatnonzero(strata == name)
        picked[rng.choice(pool, int(chosen[pool].sum()), replace=False)] = True
    return units.take(np.flatnonzero(picked))


def freeze_of(
    units: UnitSet, setting: Setting, *, random_seed: int | None = None, offload: bool = False
) -> UnitFreeze:
    """Make what holds a setting still while a model is trained.

    Raises:
        ConfigurationError: As in `units_of`.
    """
    named = units_of(units, setting, random_seed=random_seed)
    if setting == "redundant":
        marked = np.full(len(named), CATEGORIES.index("RU"), dtype=np.uint8)
        return RedundantUnitBudget(replace(named, category=marked), offload=offload)
    marked = np.full(len(named), CATEGORIES.index("SCU"), dtype=np.uint8)
    return SafetyFreeze(replace(named, category=marked), offload=offload)


def _names(units: UnitSet) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    big = np.int64(2**40)
    return (units.layer.astype(np.int64) * 2 + units.kind) * big + units.index
