"""Fit a linear probe to activations of labelled responses.

Knows four ways of fitting, standardisation and what makes a feature unusable. Does not know
models, text, thresholds or which configuration is best.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from probes.activations.features import BeforeOnset, ResponseFeatures, Segment, label_segments
from probes.fitting.windowed_loss import Solution, Windows, minimise
from safe_decode.activations.site import Site
from safe_decode.errors import ConfigurationError, DataError, NonFiniteError
from safe_decode.probe.linear import LinearProbe

__all__ = [
    "FitConfig",
    "FittedProbe",
    "LinearProbeFitter",
    "Method",
    "Standardisation",
    "evenly",
    "fitted_probe",
    "mean_logit",
    "standardisation_of",
]

Method = Literal["pooled", "token", "windowed", "mass_mean"]
"""pooled: logistic regression on means over positions, the baseline to beat.
token: logistic regression on single positions, equal weight a response.
windowed: softmax-weighted cross-entropy of sliding-window means (arXiv 2601.04603).
mass_mean: difference of the two means (arXiv 2310.06824), every feature of equal spread;
nothing is optimised, so nothing is overfitted."""

# A feature whose spread is this small beside the median feature's is dead or constant;
# dividing by it would turn float noise into signal.
_RELATIVE_STD_FLOOR = 1e-4
_ABSOLUTE_STD_FLOOR = 1e-7


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a probe is fitted.

    Attributes:
        method: See `Method`.
        c: Inverse strength of the L2 penalty, in scikit-learn's sense with one unit of
            weight a response. Without meaning for `mass_mean`.
        before_onset: See `BeforeOnset`.
        tokens_per_response: At most so many positions of a segment, evenly spaced, are
            used by `token`; neighbours carry almost the same information.
        window: Positions of a sliding window, for `windowed`.
        tau: Temperature of the softmax over windows, for `windowed`.
        max_iterations: Of the optimiser.

    Raises:
        ConfigurationError: A number is not above 0.
    """

    method: Method = "token"
    c: float = 0.1
    before_onset: BeforeOnset = "negative"
    tokens_per_response: int = 24
    window: int = 8
    tau: float = 1.0
    max_iterations: int = 200

    def __post_init__(self) -> None:
        for name in ("c", "tokens_per_response", "window", "tau", "max_iterations"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be above 0.")


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """A probe and what fitting found out.

    Attributes:
        probe: One head, `harm`.
        benign_mean: [K] mean logit over the positions of harmless responses, each response
            of equal weight; where a monitor's smoother starts.
        config: How it was fitted.
        dead_features: Features without spread; their weights are 0.
        converged: Whether the optimiser stopped by itself.
    """

    probe: LinearProbe
    benign_mean: tuple[float, ...]
    config: FitConfig
    dead_features: int
    converged: bool


class LinearProbeFitter:
    """Fits one `LinearProbe`; after `fit`, it holds nothing of the data.

    Args:
        config: How to fit.
    """

    def __init__(self, config: FitConfig | None = None) -> None:
        self.config = config or FitConfig()

    def fit(self, features: ResponseFeatures, harmful: Sequence[bool]) -> FittedProbe:
        """Fit a probe that tells harmful from harmless positions.

        Args:
            features: Of responses; float16 storage is read as float32.
            harmful: One label a response.

        Raises:
            ConfigurationError: Labels or onsets do not fit the responses.
            DataError: All labels are equal, or every feature is dead.
            NonFiniteError: An activation is NaN or infinite.
        """
        segments = label_segments(features, harmful, before_onset=self.config.before_onset)
        return self.fit_segments(features, segments, harmful)

    def fit_segments(
        self, features: ResponseFeatures, segments: Sequence[Segment], harmful: Sequence[bool]
    ) -> FittedProbe:
        """Fit on segments that were labelled already; otherwise as `fit`."""
        examples = self._examples(features, segments)
        mean, std, dead = _standardisation(examples)
        rows = examples.rows
        rows -= mean
        rows /= std
        rows[:, dead] = 0.0
        solution = self._solve(examples)
        solution.weight[dead] = 0.0
        probe = fitted_probe(features.sites, solution, mean, std)
        benign = [v for v, label in zip(features.responses, harmful, strict=True) if not label]
        return FittedProbe(
            probe, mean_logit(probe, benign), self.config, int(dead.sum()), solution.converged
        )

    def _examples(self, features: ResponseFeatures, segments: Sequence[Segment]) -> _Examples:
        parts: list[NDArray[np.float32]] = []
        for segment in segments:
            part = features.responses[segment.row][segment.start : segment.stop]
            if self.config.method == "token":
                part = part[evenly(len(part), self.config.tokens_per_response)]
            part = np.asarray(part, dtype=np.float32)
            if self.config.method == "pooled":
                part = part.mean(axis=0, keepdims=True)
            parts.append(part)
        rows = np.concatenate(parts)
        if not np.isfinite(rows).all():
            raise NonFiniteError("an activation is NaN or infinite; harvest in float32.")
        return _Examples(
            rows,
            np.asarray([len(part) for part in parts]),
            np.asarray([segment.harmful for segment in segments]),
            np.asarray([segment.weight for segment in segments]),
        )

    def _solve(self, examples: _Examples) -> Solution:
        config = self.config
        if config.method == "windowed":
            windows = Windows.over(
                examples.sizes, examples.harmful, examples.weight, width=config.window
            )
            return minimise(
                examples.rows,
                windows,
                c=config.c,
                tau=config.tau,
                max_iterations=config.max_iterations,
            )
        if config.method == "mass_mean":
            return _mass_mean(examples)
        model = LogisticRegression(C=config.c, max_iter=config.max_iterations)
        with warnings.catch_warnings():
            # Stopping at max_iter is reported as `converged`, not as a warning.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(
                examples.rows,
                np.repeat(examples.harmful, examples.sizes),
                sample_weight=examples.row_weights(),
            )
        return Solution(
            model.coef_[0].astype(np.float32),
            float(model.intercept_[0]),
            int(model.n_iter_.max()) < config.max_iterations,
        )


def fitted_probe(
    sites: Sequence[Site],
    solution: Solution,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
) -> LinearProbe:
    """Fold a solution for standardised features into a probe with the head `harm`."""
    return LinearProbe.folded(
        sites,
        torch.from_numpy(solution.weight)[:, None],
        torch.tensor([solution.bias]),
        torch.from_numpy(mean),
        torch.from_numpy(std),
        ("harm",),
    )


def mean_logit(probe: LinearProbe, responses: Sequence[NDArray[Any]]) -> tuple[float, ...]:
    """Return the mean logit of each head, [K], each response of equal weight."""
    means = np.stack([np.asarray(v, dtype=np.float32).mean(axis=0) for v in responses])
    logits = probe(torch.from_numpy(means)).double().mean(dim=0)
    return tuple(logits.tolist())


def _mass_mean(examples: _Examples) -> Solution:
    """Take the difference of means, scaled to the logit of two normal laws of equal spread."""
    weights = examples.row_weights()
    positive = np.repeat(examples.harmful, examples.sizes)
    means = [
        np.average(examples.rows[mask], axis=0, weights=weights[mask])
        for mask in (positive, ~positive)
    ]
    direction = means[0] - means[1]
    projected = examples.rows @ direction
    high, low = (float(mean @ direction) for mean in means)
    within = np.average((projected - np.where(positive, high, low)) ** 2, weights=weights)
    scale = (high - low) / max(float(within), _ABSOLUTE_STD_FLOOR)
    weight = (scale * direction).astype(np.float32)
    return Solution(weight, -scale * (high + low) / 2, True)


class _Examples(NamedTuple):
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
        weights: NDArray[np.float64] = np.repeat(self.weight / self.sizes, self.sizes)
        return weights


class Standardisation(NamedTuple):
    """Means and spreads of features, [F] each; the spread of a dead one is 1."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    dead: NDArray[np.bool_]


def _standardisation(examples: _Examples) -> Standardisation:
    weights = examples.row_weights() / examples.weight.sum()
    # float64 through the product with the weights: means far above their spread stay exact.
    mean = weights @ examples.rows
    return standardisation_of(mean, weights @ np.square(examples.rows - mean))


def standardisation_of(mean: NDArray[np.float64], variance: NDArray[np.float64]) -> Standardisation:
    """Set the floor under the spread of features.

    Raises:
        DataError: Every feature is dead.
    """
    std = np.sqrt(np.maximum(variance, 0.0))
    dead = std <= max(_RELATIVE_STD_FLOOR * float(np.median(std)), _ABSOLUTE_STD_FLOOR)
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
