"""Positions of labelled responses as rows to fit on, and their standardisation.

Knows segments, weights and what makes a feature unusable. Does not know losses, models or kinds
of probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from probes.activations.features import ResponseFeatures, Segment
from safe_decode.errors import DataError, NonFiniteError

__all__ = [
    "Examples",
    "Standardisation",
    "evenly",
    "examples_of",
    "standardisation_of",
    "standardise",
]

# A feature whose spread is this small beside the median feature's is dead or constant;
# dividing by it would turn float noise into signal.
_RELATIVE_STD_FLOOR = 1e-4
ABSOLUTE_STD_FLOOR = 1e-7


class Examples(NamedTuple):
    """Rows of all segments, one after the other.

    Attributes:
        rows: [N, F] float32.
        sizes: [S] rows of each segment.
        harmful: [S] label of each segment.
        weight: [S] weight of each segment.
    """

    rows: NDArray[np.float32]
    sizes: NDArray[np.intp]
    harmful: NDArray[np.bool_]
    weight: NDArray[np.float64]

    def row_weights(self) -> NDArray[np.float64]:
        """Return the weight of each row, [N]: rows of a segment share its weight."""
        weights: NDArray[np.float64] = np.repeat(self.weight / self.sizes, self.sizes)
        return weights


def examples_of(
    features: ResponseFeatures,
    segments: Sequence[Segment],
    *,
    most_rows: int | None = None,
    is_pooled: bool = False,
) -> Examples:
    """Gather the rows of segments.

    Args:
        features: Of responses.
        segments: Which positions teach which label.
        most_rows: At most so many rows of a segment, evenly spaced; None: all.
        is_pooled: One row a segment, the mean over its positions.

    Raises:
        NonFiniteError: An activation is NaN or infinite.
    """
    parts: list[NDArray[np.float32]] = []
    for segment in segments:
        part = features.responses[segment.row][segment.start : segment.stop]
        if most_rows is not None:
            part = part[evenly(len(part), most_rows)]
        part = np.asarray(part, dtype=np.float32)
        parts.append(part.mean(axis=0, keepdims=True) if is_pooled else part)
    rows = np.concatenate(parts)
    if not np.isfinite(rows).all():
        raise NonFiniteError("an activation is NaN or infinite; harvest in float32.")
    return Examples(
        rows,
        np.asarray([len(part) for part in parts]),
        np.asarray([segment.harmful for segment in segments]),
        np.asarray([segment.weight for segment in segments]),
    )


class Standardisation(NamedTuple):
    """Means and spreads of features, [F] each; the spread of a dead one is 1."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    dead: NDArray[np.bool_]


def standardise(examples: Examples) -> Standardisation:
    """Standardise the rows in place, dead features to 0; returns by what.

    Raises:
        DataError: Every feature is dead.
    """
    weights = examples.row_weights() / examples.weight.sum()
    # float64 through the product with the weights: means far above their spread stay exact.
    mean = weights @ examples.rows
    standard = standardisation_of(mean, weights @ np.square(examples.rows - mean))
    rows = examples.rows
    rows -= standard.mean
    rows /= standard.std
    rows[:, standard.dead] = 0.0
    return standard


def standardisation_of(mean: NDArray[np.float64], variance: NDArray[np.float64]) -> Standardisation:
    """Set the floor under the spread of features.

    Raises:
        DataError: Every feature is dead.
    """
    std = np.sqrt(np.maximum(variance, 0.0))
    dead = std <= max(_RELATIVE_STD_FLOOR * float(np.median(std)), ABSOLUTE_STD_FLOOR)
    if dead.all():
        raise DataError(f"all {len(std)} features are constant; read other sites.")
    return Standardisation(
        mean.astype(np.float32), np.where(dead, 1.0, std).astype(np.float32), dead
    )


def evenly(length: int, most: int) -> NDArray[np.intp]:
    """Choose at most so many of the numbers below `length`, evenly spaced, ends included."""
    if length <= most:
        return np.arange(length)
    return np.linspace(0, length - 1, most).round().astype(np.intp)
