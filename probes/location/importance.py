"""Importance of input channels and of units: the arithmetic of location.

For a two-matrix module f(X) = B s(A X), input channel j of B has the importance

    I_j = 1 / (N - 1) * sum_n (X[n, j] - mean_j)^2 * ||B[:, j]||^2

(Li & Kim, arXiv 2410.10862; FLAP's fluctuation metric with weights, arXiv 2312.11983).

Knows streaming moments and scores. Does not know models, hooks or text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.location.units import UnitScores
from safe_decode.errors import ConfigurationError, DataError, NonFiniteError

__all__ = ["ChannelMoments", "RunningMoments", "Variant", "score_units"]

Variant = Literal["flap", "plain"]
"""flap: the metric of the attention output projection is squared and channels are z-scored
within layer and module before the mean over a head, as FLAP's published code does.
plain: no square, and the means over heads are z-scored within the layer. The paper does
not say which it used."""

# Below this share of the mean score, the spread within a module is rounding, not signal.
_SPREAD_FLOOR = 1e-12
_IN_CACHE = 1 << 18  # numbers of one part of a batch


class RunningMoments:
    """Mean and variance of a stream of rows, by Chan's pairwise update.

    Memory does not grow with the rows. The accumulators are float64: float32 sums over a
    million tokens lose the digits in which channels differ.

    Args:
        width: Entries of a row.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._mean = torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, dtype=torch.float64)

    def update(self, rows: Tensor, counted: Tensor | None = None) -> None:
        """Add rows.

        Args:
            rows: [..., width], any float dtype and device. Deviations are taken from the mean so
                far, or of these rows if they are the first, so that no large squares are
                subtracted from each other.
            counted: [...] bool, the rows to be added; None: all. Cheaper than selecting them.

        Raises:
            NonFiniteError: A value of a counted row is NaN or infinite.
        """
        weights = rows.new_ones(rows.shape[:-1]) if counted is None else counted
        n = int(weights.sum())
        if not n:
            return
        weights = weights.float()
        near = self._mean.to(rows.device, torch.float32) if self.count else _mean_of(rows, weights)
        sums, squares = _deviations(rows, weights, near)
        if not bool(torch.isfinite(squares).all()):
            if counted is not None and not bool(counted.all()):
                # Padding may hold anything, and nothing times NaN is NaN.
                self.update(rows[counted])
                return
            raise NonFiniteError("an activation is NaN or infinite; load the model in float32.")
        squares = (squares - sums.square() / n).clamp_(min=0)
        mean, total = near.double().cpu() + sums / n, self.count + n
        gap = mean - self._mean
        self._squares += squares + gap.square() * (self.count * n / total)
        self._mean += gap * (n / total)
        self.count = total

    def variance(self) -> Tensor:
        """Return the unbiased variance, [width] float64.

        Raises:
            DataError: Fewer than two rows were seen.
        """
        if self.count < 2:
            raise DataError(f"{self.count} rows have no variance; give at least two positions.")
        return self._squares / (self.count - 1)

    def mean(self) -> Tensor:
        """Return the mean, [width] float64; zeros of nothing."""
        return self._mean.clone()

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Return all that is needed to go on later."""
        count = np.asarray(self.count, dtype=np.float64)
        return {"count": count, "mean": self._mean.numpy(), "squares": self._squares.numpy()}

    @classmethod
    def resumed(cls, state: Mapping[str, NDArray[np.float64]]) -> RunningMoments:
        """Go on from what `state` returned."""
        moments = cls(len(state["mean"]))
        moments.count = int(state["count"])
        moments._mean = torch.from_numpy(state["mean"].copy())
        moments._squares = torch.from_numpy(state["squares"].copy())
        return moments


def _deviations(rows: Tensor, weights: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Sum deviations from `near` and their squares, two of [width] float64 on the CPU.

    Part by part, so that deviations stay in a cache instead of going to memory and back; in
    float32 within a part, which is some hundred deviations of one scale. A product with the
    weights sums faster than a sum, and leaves out what does not count.
    """
    sums, squares = (rows.new_zeros(rows.shape[-1], dtype=torch.float64) for _ in range(2))
    for part, weight in _parts(rows, weights):
        deviations = part.float().sub(near).flatten(0, -2)
        sums += weight.flatten() @ deviations
        squares += weight.flatten() @ deviations.square_()
    return sums.cpu(), squares.cpu()


def _mean_of(rows: Tensor, weights: Tensor) -> Tensor:
    total = rows.new_zeros(rows.shape[-1], dtype=torch.float32)
    for part, weight in _parts(rows, weights):
        total += weight.flatten() @ part.float().flatten(0, -2)
    return total / weights.sum()


def _parts(rows: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut along the first axis, a cache's worth at a time on a CPU, whole on an accelerator."""
    of_one = rows[0].numel()
    size = max(1, _IN_CACHE // of_one) if rows.is_cpu else len(rows)
    return zip(torch.split(rows, size), torch.split(weights, size), strict=True)


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """What location needs to know of one module.

    Attributes:
        layer: Decoder block.
        kind: `attn` for the attention output projection, `mlp` for the down projection.
        variance: [W] float64, unbiased variance of each input channel over positions.
        column_norm_sq: [W] float64, squared norm of the weights that read the channel.
        positions: Over how many positions the variance was taken.
        mean: [W] float64, mean of each input channel over positions; empty where not kept.
    """

    layer: int
    kind: Literal["attn", "mlp"]
    variance: NDArray[np.float64]
    column_norm_sq: NDArray[np.float64]
    positions: int
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def importance(self) -> NDArray[np.float64]:
        """Return I_j, [W] float64."""
        return self.variance * self.column_norm_sq


def score_units(
    safety: Sequence[ChannelMoments],
    utility: Sequence[ChannelMoments],
    *,
    head_dim: int,
    variant: Variant = "flap",
) -> UnitScores:
    """Turn the moments of two data sets into z-scores for every unit.

    Args:
        safety: Moments over the model's own refusals of harmful requests.
        utility: Moments of the same modules over answers to benign requests.
        head_dim: Channels of an attention head.
        variant: See `Variant`.

    Raises:
        ConfigurationError: The two lists name different modules.
    """
    modules = [(m.layer, m.kind) for m in safety]
    if modules != [(m.layer, m.kind) for m in utility] or not modules:
        raise ConfigurationError(
            "safety and utility hold moments of different modules; locate both on one model."
        )
    i_s = [_module_scores(m, head_dim=head_dim, variant=variant) for m in safety]
    i_u = [_module_scores(m, head_dim=head_dim, variant=variant) for m in utility]
    sizes = [len(scores) for scores in i_s]
    return UnitScores(
        layer=np.repeat([m.layer for m in safety], sizes).astype(np.int32),
        kind=np.repeat([int(m.kind == "mlp") for m in safety], sizes).astype(np.uint8),
        index=np.concatenate([np.arange(size) for size in sizes]).astype(np.int32),
        i_s=np.concatenate(i_s).astype(np.float32),
        i_u=np.concatenate(i_u).astype(np.float32),
        head_dim=head_dim,
    )


def _module_scores(
    moments: ChannelMoments, *, head_dim: int, variant: Variant
) -> NDArray[np.float64]:
    scores = moments.importance()
    if moments.kind == "mlp":
        return _z_scores(scores)
    if variant == "plain":
        return _z_scores(_head_means(scores, head_dim))
    return _head_means(_z_scores(scores**2), head_dim)


def _head_means(scores: NDArray[np.float64], head_dim: int) -> NDArray[np.float64]:
    means: NDArray[np.float64] = scores.reshape(-1, head_dim).mean(axis=1)
    return means


def _z_scores(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # ddof=1 as torch.std in FLAP's code; a single unit, or units all alike, score 0.
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    if spread <= _SPREAD_FLOOR * abs(values.mean()):
        return np.zeros_like(values)
    scaled: NDArray[np.float64] = (values - values.mean()) / spread
    return scaled
