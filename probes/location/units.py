"""Units, their categories, and where a probe reads them.

A unit is a whole attention head or one MLP neuron: what can be removed from a
two-matrix module without touching its neighbours (Li & Kim, "Superficial Safety
Alignment Hypothesis", arXiv 2410.10862). Under grouped-query attention a head is a
query head, since the input of the output projection has `n_heads * head_dim` channels
however few key-value heads there are.

Knows scores, ratios, ranking and the file format. Does not know models or text.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from safe_decode.activations.site import Site, sorted_sites
from safe_decode.errors import ConfigurationError, DataError

__all__ = [
    "CATEGORIES",
    "Category",
    "Ratios",
    "Ranking",
    "UnitSet",
    "UnitScores",
    "assign",
    "sites_of",
]

Category = Literal["RU", "SCU", "UCU", "CU"]
"""RU: redundant. SCU: safety-critical. UCU: utility-critical. CU: complex, all the rest."""
Ranking = Literal["joint", "separate"]
"""joint: one ranking over heads and neurons. separate: the ratios hold within each kind."""

CATEGORIES: tuple[Category, ...] = get_args(Category)
_HEAD, _NEURON = 0, 1
_FORMAT = "safe-decode-units-1"
_ARRAYS: Mapping[str, Any] = {
    "layer": np.int32,
    "kind": np.uint8,
    "index": np.int32,
    "i_s": np.float32,
    "i_u": np.float32,
    "category": np.uint8,
}


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Shares of all units that the first three categories take, in the paper's order.

    Attributes:
        redundant: RU, the smallest I_U + I_S.
        safety: SCU, of the rest the largest I_S - I_U.
        utility: UCU, of the rest the smallest I_S - I_U.

    Raises:
        ConfigurationError: A share is negative or they add to more than 1.
    """

    redundant: float = 0.13
    safety: float = 0.02
    utility: float = 0.13

    def __post_init__(self) -> None:
        shares = (self.redundant, self.safety, self.utility)
        if min(shares) < 0 or sum(shares) > 1:
            raise ConfigurationError(
                f"ratios redundant={self.redundant}, safety={self.safety}, utility={self.utility} "
                "must be >= 0 and add to at most 1; lower them."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitScores:
    """z-scored importance of every unit, one entry a unit.

    Attributes:
        layer: [U] int32, decoder block.
        kind: [U] uint8, 0 for an attention head, 1 for an MLP neuron.
        index: [U] int32, head or neuron within its layer.
        i_s: [U] float32, importance for safety: on refusals of harmful requests.
        i_u: [U] float32, importance for utility: on answers to benign requests.
        head_dim: Channels a head contributes.
    """

    layer: NDArray[np.int32]
    kind: NDArray[np.uint8]
    index: NDArray[np.int32]
    i_s: NDArray[np.float32]
    i_u: NDArray[np.float32]
    head_dim: int

    def __len__(self) -> int:
        """Count the units."""
        return len(self.layer)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitSet(UnitScores):
    """Units with a category and a record of how it was found.

    Attributes:
        category: [U] uint8, index into `CATEGORIES`.
        provenance: JSON: data, variant, ranking, ratios.
    """

    category: NDArray[np.uint8]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def take(self, order: NDArray[np.intp]) -> UnitSet:
        """Keep the units at the given positions, in that order."""
        return replace(self, **{name: getattr(self, name)[order] for name in _ARRAYS})

    def only(self, *categories: Category) -> UnitSet:
        """Keep the units of some categories."""
        wanted = [CATEGORIES.index(category) for category in categories]
        return self.take(np.flatnonzero(np.isin(self.category, wanted)))

    def most_critical(self, max_features: int) -> UnitSet:
        """Keep the units of largest I_S - I_U that together have `max_features` channels.

        Redundant units are passed over, as in the assignment; a head that no longer fits
        is passed over in favour of the next units that do.

        Raises:
            ConfigurationError: Not even one unit fits.
        """
        widths = np.where(self.kind == _HEAD, self.head_dim, 1)
        left, kept = max_features, []
        for unit in np.argsort(self.i_u - self.i_s, kind="stable"):
            if self.category[unit] != CATEGORIES.index("RU") and widths[unit] <= left:
                kept.append(unit)
                left -= int(widths[unit])
        if not kept:
            raise ConfigurationError(f"max_features={max_features} holds no unit; raise it.")
        return self.take(np.asarray(kept, dtype=np.intp))

    def counts(self) -> dict[Category, int]:
        """Count the units of each category."""
        return {c: int((self.category == i).sum()) for i, c in enumerate(CATEGORIES)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors with JSON metadata; a reader never sees half a file."""
        arrays = {n: np.ascontiguousarray(getattr(self, n), t) for n, t in _ARRAYS.items()}
        metadata = {
            "format": _FORMAT,
            "head_dim": str(self.head_dim),
            "provenance": json.dumps(self.provenance, sort_keys=True),
        }
        target = Path(path)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            temporary = Path(scratch) / "units"
            save_file(arrays, temporary, metadata)
            os.replace(temporary, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UnitSet:
        """Read what `save` wrote.

        Raises:
            DataError: The file is truncated, of a foreign format, or inconsistent.
        """
        try:
            with safe_open(path, framework="numpy") as stored:
                metadata = stored.metadata() or {}
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{os.fspath(path)} cannot be read as units: {error}") from error
        shapes = {a.shape for a in arrays.values()}
        if metadata.get("format") != _FORMAT or set(arrays) != set(_ARRAYS) or len(shapes) != 1:
            raise DataError(
                f"{os.fspath(path)} has format {metadata.get('format')!r} and arrays "
                f"{sorted(arrays)}, wanted {_FORMAT!r} and {sorted(_ARRAYS)}; locate again."
            )
        provenance = json.loads(metadata["provenance"])
        return cls(**arrays, head_dim=int(metadata["head_dim"]), provenance=provenance)


def assign(
    scores: UnitScores,
    ratios: Ratios,
    *,
    ranking: Ranking = "joint",
    provenance: Mapping[str, Any] | None = None,
) -> UnitSet:
    """Sort units into RU, SCU, UCU and CU, in this order, by stated ratios.

    Ties go to the unit listed first, so the outcome does not depend on the platform.
    """
    category = np.full(len(scores), CATEGORIES.index("CU"), dtype=np.uint8)
    pools = [np.arange(len(scores))]
    if ranking == "separate":
        pools = [np.flatnonzero(scores.kind == kind) for kind in (_HEAD, _NEURON)]
    total = scores.i_u.astype(np.float64) + scores.i_s
    excess = scores.i_s.astype(np.float64) - scores.i_u
    for pool in pools:
        size, rest = len(pool), pool
        steps: tuple[tuple[Category, float, NDArray[np.float64]], ...] = (
            ("RU", ratios.redundant, total),
            ("SCU", ratios.safety, -excess),
            ("UCU", ratios.utility, excess),
        )
        for name, ratio, key in steps:
            rest = rest[np.argsort(key[rest], kind="stable")]
            taken = round(ratio * size)
            category[rest[:taken]] = CATEGORIES.index(name)
            rest = np.sort(rest[taken:])
    return UnitSet(
        **{name: getattr(scores, name) for name in _ARRAYS if name != "category"},
        head_dim=scores.head_dim,
        category=category,
        provenance={**(provenance or {}), "ratios": vars(ratios), "ranking": ranking},
    )


def sites_of(units: UnitSet) -> tuple[Site, ...]:
    """Name the channels at which all of `units` are read: a head gives `head_dim` channels.

    Raises:
        ConfigurationError: `units` is empty.
    """
    channels: dict[tuple[int, str], list[int]] = {}
    for layer, kind, index in zip(units.layer, units.kind, units.index, strict=True):
        if kind == _HEAD:
            here = range(int(index) * units.head_dim, (int(index) + 1) * units.head_dim)
            channels.setdefault((int(layer), "attn"), []).extend(here)
        else:
            channels.setdefault((int(layer), "mlp"), []).append(int(index))
    return sorted_sites(
        Site(layer, kind, tuple(sorted(found)))  # type: ignore[arg-type]
        for (layer, kind), found in channels.items()
    )
