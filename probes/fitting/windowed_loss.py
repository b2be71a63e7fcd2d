"""The softmax-weighted loss of sliding-window logits (arXiv 2601.04603).

For each segment, with logits z_t averaged over windows of M positions to m_t:

    sum_t softmax(m / tau)_t * cross_entropy(m_t, label)  +  ||w||^2 / (2 C)

A harmful segment has to be seen somewhere, a harmless one must not fire anywhere, and
windows that start before the segment are ignored. M = 1 weighs single positions.

Knows the loss and its minimiser. Does not know responses, sites or standardisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

__all__ = ["Solution", "Windows", "minimise"]

_LBFGS_HISTORY = 20


class Solution(NamedTuple):
    """Weights for standardised features.

    Attributes:
        weight: [F] float32.
        bias: For the same logit.
        converged: Whether the optimiser stopped by itself.
    """

    weight: NDArray[np.float32]
    bias: float
    converged: bool


@dataclass(frozen=True, eq=False)
class Windows:
    """Sliding windows over concatenated segments.

    Attributes:
        first: [W] int64, first row of each window.
        stop: [W] int64, row after its last.
        segment: [W] int64, which segment it lies in.
        harmful: [S] float64, 1 or 0.
        weight: [S] float64.
    """

    first: Tensor
    stop: Tensor
    segment: Tensor
    harmful: Tensor
    weight: Tensor

    @classmethod
    def over(
        cls,
        sizes: NDArray[np.intp],
        harmful: NDArray[np.bool_],
        weight: NDArray[np.float64],
        *,
        width: int,
    ) -> Windows:
        """Lay windows of `width` rows over segments; a shorter segment gets one of its own size."""
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        span = np.minimum(sizes, width)
        n_windows = sizes - span + 1
        segment = np.repeat(np.arange(len(sizes)), n_windows)
        within = np.arange(n_windows.sum()) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
        first = starts[segment] + within
        return cls(
            torch.from_numpy(first),
            torch.from_numpy(first + span[segment]),
            torch.from_numpy(segment),
            torch.from_numpy(harmful.astype(np.float64)),
            torch.from_numpy(weight.astype(np.float64)),
        )

    def means(self, logits: Tensor) -> Tensor:
        """Average logits over each window: [N] -> [W].

        Sums are differences of one running sum, in float64: over 10^6 rows float32 would
        lose the window in the total.
        """
        total = functional.pad(torch.cumsum(logits.double(), 0), (1, 0))
        return (total[self.stop] - total[self.first]) / (self.stop - self.first)

    def loss(self, logits: Tensor, tau: float) -> Tensor:
        """Return the weighted sum of the losses of all segments, a float64 scalar."""
        means = self.means(logits)
        n_segments = len(self.weight)
        peak = torch.full((n_segments,), -torch.inf, dtype=means.dtype)
        peak = peak.scatter_reduce(0, self.segment, means.detach(), "amax")
        soft = torch.exp((means - peak[self.segment]) / tau)
        total = torch.zeros(n_segments, dtype=means.dtype).index_add(0, self.segment, soft)
        entropy = functional.binary_cross_entropy_with_logits(
            means, self.harmful[self.segment], reduction="none"
        )
        share = soft / total[self.segment]
        return (share * entropy * self.weight[self.segment]).sum()


def minimise(
    rows: NDArray[np.float32],
    windows: Windows,
    *,
    c: float,
    tau: float,
    max_iterations: int,
) -> Solution:
    """Minimise the loss by L-BFGS from zero weights.

    At zero weights every position counts the same, so the start is the plain
    cross-entropy and the result does not depend on a seed.

    Args:
        rows: [N, F] float32, standardised.
        windows: Over the rows.
        c: Inverse strength of the L2 penalty; the bias is not penalised.
        tau: Temperature of the softmax.
        max_iterations: Of L-BFGS.
    """
    inputs = torch.from_numpy(rows)
    weight = torch.zeros(rows.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    scale = float(windows.weight.sum())
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        history_size=_LBFGS_HISTORY,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        penalty = weight.double().square().sum() / (2 * c)
        # Divided by the number of responses so that the tolerances mean the same at any size.
        loss = (windows.loss(inputs @ weight + bias, tau) + penalty) / scale
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    iterations = optimiser.state[weight]["n_iter"]
    return Solution(weight.detach().numpy(), float(bias.detach()), iterations < max_iterations)
