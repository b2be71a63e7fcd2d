"""Which located units are held still: the safety-critical ones, or all but the redundant ones.

Knows categories of units and the weights that are theirs. Does not know how weights are held
while a model is trained; that is `freeze`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from probes.finetuning.freeze import UnitFreeze
from probes.finetuning.lora import (
    carries_adapters,
    held_in_adapters,
    plain_architecture,
    trained_in_adapters,
)
from probes.finetuning.unit_weights import Shared, WeightSlice, complement, owned_weights
from probes.location.units import CATEGORIES, Category, UnitSet
from safe_decode.errors import ConfigurationError
from safe_decode.typing import CausalLM

__all__ = ["RedundantUnitBudget", "SafetyFreeze", "safety_setting"]

_TOP_COMPLEX = 0.06  # the paper's setting (i)


class SafetyFreeze(UnitFreeze):
    """Holds safety-critical units still and trains the rest.

    Args:
        units: As located on the model, all of its units.
        categories: Frozen whole.
        complex_share: Share of the complex units that is frozen too, those of largest
            I_S - I_U, within each kind if they were located by separate rankings. The
            paper's "top 6 %" is read as a share of the complex units, not of all.
        shared: Whether key and value rows that several heads share are frozen with `any`
            of these heads, so that each frozen head is held whole, or with `all` of them.
        offload: See `UnitFreeze`.

    Raises:
        ConfigurationError: No unit is frozen, or the options contradict each other.
    """

    def __init__(
        self,
        units: UnitSet,
        categories: Sequence[Category] = ("SCU",),
        *,
        complex_share: float = 0.0,
        shared: Shared = "any",
        offload: bool = False,
    ) -> None:
        super().__init__(offload=offload)
        _require_categories(categories)
        if not 0 <= complex_share <= 1 or (complex_share and "CU" in categories):
            raise ConfigurationError(
                f"complex_share={complex_share} must be in 0..1, and 0 where categories holds CU."
            )
        self.units = _with_top_complex(units, categories, complex_share)
        self.shared: Shared = shared
        _require_some(self.units, categories)

    def frozen_weights(self, model: CausalLM) -> tuple[WeightSlice, ...]:
        """Name the weights of the frozen units; see `adapters` for models that carry LoRA."""
        if carries_adapters(model):
            plain = plain_architecture(model)
            return held_in_adapters(model, owned_weights(plain, self.units, shared=self.shared))
        return owned_weights(model, self.units, shared=self.shared)


class RedundantUnitBudget(UnitFreeze):
    """Trains redundant units and holds everything else still.

    Embeddings, norms, output biases and the output head are held too, and so are key and
    value rows that a redundant head shares with one that is not.

    Args:
        units: As located on the model.
        categories: Trained.
        offload: See `UnitFreeze`.

    Raises:
        ConfigurationError: No unit is trained.
    """

    def __init__(
        self, units: UnitSet, categories: Sequence[Category] = ("RU",), *, offload: bool = False
    ) -> None:
        super().__init__(offload=offload)
        _require_categories(categories)
        self.units = units.only(*categories)
        _require_some(self.units, categories)

    def frozen_weights(self, model: CausalLM) -> tuple[WeightSlice, ...]:
        """Name all weights but those of the trained units; with LoRA, all that is trained."""
        if carries_adapters(model):
            owned = owned_weights(plain_architecture(model), self.units, shared="all")
            return trained_in_adapters(model, owned)
        return complement(model, owned_weights(model, self.units, shared="all"))


def safety_setting(
    units: UnitSet, setting: Literal["i", "ii"], *, offload: bool = False
) -> SafetyFreeze:
    """Freeze as the paper does.

    Args:
        units: As located on the model.
        setting: i: the safety-critical and the top 6 % of the complex units. ii: the
            safety-critical and all complex units.
        offload: See `UnitFreeze`.

    Raises:
        ConfigurationError: Another setting.
    """
    if setting not in ("i", "ii"):
        raise ConfigurationError(f"setting={setting!r} is not 'i' or 'ii'; pass one of these.")
    if setting == "i":
        return SafetyFreeze(units, complex_share=_TOP_COMPLEX, offload=offload)
    return SafetyFreeze(units, ("SCU", "CU"), offload=offload)


def _with_top_complex(units: UnitSet, categories: Sequence[Category], share: float) -> UnitSet:
    """Keep the units of some categories and the most critical complex ones."""
    wanted = np.isin(units.category, [CATEGORIES.index(category) for category in categories])
    is_complex = units.category == CATEGORIES.index("CU")
    separate = units.provenance.get("ranking") == "separate"
    pools = [is_complex & (units.kind == kind) for kind in (0, 1)] if separate else [is_complex]
    excess = units.i_s.astype(np.float64) - units.i_u
    for pool in pools:
        ranked = np.flatnonzero(pool)
        ranked = ranked[np.argsort(-excess[ranked], kind="stable")]
        wanted[ranked[: round(share * len(ranked))]] = True
    return units.take(np.flatnonzero(wanted))


def _require_categories(categories: Sequence[Category]) -> None:
    if isinstance(categories, str) or not categories or set(categories) - set(CATEGORIES):
        raise ConfigurationError(
            f"categories={categories!r} is not a non-empty sequence of {CATEGORIES}; pass some."
        )


def _require_some(units: UnitSet, categories: Sequence[Category]) -> None:
    if not len(units):
        raise ConfigurationError(
            f"units hold none of categories={tuple(categories)}; locate again with larger ratios."
        )
