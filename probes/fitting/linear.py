"""Fit a linear probe to activations of labelled responses.

Knows four ways of fitting. Does not know models, text, thresholds or which configuration is
best.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from probes.activations.features import ResponseFeatures, Segment, columns_of, label_segments
from probes.fitting.examples import (
    ABSOLUTE_STD_FLOOR,
    Examples,
    examples_of,
    standardise,
)
from probes.fitting.interface import (
    Ability,
    FitSettings,
    FittedProbe,
    Fitter,
    Stream,
    require_positive,
)
from probes.fitting.windowed_loss import Solution, Windows, minimise
from safe_decode.activations.site import Site, n_features, sorted_sites
from safe_decode.errors import ConfigurationError
from safe_decode.probe.interface import Probe
from safe_decode.probe.linear import LinearProbe

__all__ = [
    "WINDOWS",
    "FitConfig",
    "LinearProbeFitter",
    "Method",
    "fitted_probe",
]

Method = Literal["pooled", "token", "windowed", "mass_mean"]
"""pooled: logistic regression on means over positions, the baseline to beat.
token: logistic regression on single positions, equal weight a response.
windowed: softmax-weighted cross-entropy of sliding-window means (arXiv 2601.04603).
mass_mean: difference of the two means (arXiv 2310.06824), every feature of equal spread;
nothing is optimised, so nothing is overfitted."""

WINDOWS = (1, 4, 8, 16)
"""Positions of the windowed loss to try."""

DEFAULT_C, DEFAULT_C_FEATURES = 0.1, 256
"""What C is where none is given, up to how many features; above, it falls as their number grows:
features of equal spread share what one of them could say, and a fixed C overfits thousands."""


@dataclass(frozen=True, kw_only=True)
class FitConfig(FitSettings):
    """How a linear probe is fitted.

    Attributes:
        method: See `Method`.
        c: Inverse strength of the L2 penalty, in scikit-learn's sense with one unit of
            weight a response; None: by the number of features, see `DEFAULT_C`. Without meaning
            for `mass_mean`.
        before_onset: See `BeforeOnset`.
        tokens_per_response: As in `FitSettings`; used by `token`.
        window: Positions of a sliding window, for `windowed`.
        tau: Temperature of the softmax over windows, for `windowed`.
        max_iterations: Of the optimiser.

    Raises:
        ConfigurationError: A number is not above 0.
    """

    kind: ClassVar[str] = "linear"
    method: Method = "token"
    c: float | None = None
    window: int = 8
    tau: float = 1.0
    max_iterations: int = 200

    def __post_init__(self) -> None:
        require_positive(self, ("tokens_per_response", "window", "tau", "max_iterations"))
        if self.c is not None:
            require_positive(self, ("c",))

    @property
    def label(self) -> str:
        """Name these settings in tables."""
        window = f" M={self.window}" if self.method == "windowed" else ""
        strength = "" if self.c is None else f" C={self.c:g}"
        return f"{self.method}{strength}{window}"

    def for_features(self, count: int) -> FitConfig:
        """Name C where it is left to the number of features."""
        if self.c is not None:
            return self
        return replace(self, c=DEFAULT_C * min(1.0, DEFAULT_C_FEATURES / count))

    @property
    def has_penalty(self) -> bool:
        """Whether `c` has a meaning; `mass_mean` optimises nothing."""
        return self.method != "mass_mean"


class LinearProbeFitter(Fitter):
    """Fits one `LinearProbe`; after `fit`, it holds nothing of the data.

    Args:
        config: How to fit.
    """

    abilities: ClassVar[frozenset[Ability]] = frozenset({"streamed", "penalty", "heads"})

    def __init__(self, config: FitConfig | None = None) -> None:
        self.config = config or FitConfig()

    @classmethod
    def ways(cls, methods: Sequence[str] | None, c: float | None) -> tuple[FitSettings, ...]:
        """Name the ways of fitting to try; see `Method`. Raises as `Fitter.ways`."""
        known: dict[str, Method] = {name: name for name in get_args(Method)}
        unknown = [name for name in methods or () if name not in known]
        if unknown:
            raise ConfigurationError(
                f"method={unknown[0]!r} is not one of {tuple(known)}; pass one of these."
            )
        return tuple(
            FitConfig(method=known[name], c=c, window=window)
            for name in methods or known
            for window in (WINDOWS if name == "windowed" else (8,))
        )

    def fit(
        self,
        features: ResponseFeatures,
        harmful: Sequence[bool],
        *,
        groups: Sequence[str] | None = None,  # noqa: ARG002 - nothing is held out
    ) -> FittedProbe:
        """Fit a probe that tells harmful from harmless positions. Raises as `Fitter.fit`."""
        segments = label_segments(features, harmful, before_onset=self.config.before_onset)
        return self.fit_segments(features, segments, harmful)

    def fit_segments(
        self, features: ResponseFeatures, segments: Sequence[Segment], harmful: Sequence[bool]
    ) -> FittedProbe:
        """Fit on segments that were labelled already; otherwise as `fit`."""
        config = self.config.for_features(n_features(features.sites))
        examples = examples_of(
            features,
            segments,
            most_rows=self.config.tokens_per_response if self.config.method == "token" else None,
            is_pooled=self.config.method == "pooled",
        )
        mean, std, dead = standardise(examples)
        solution = _solved(examples, config)
        solution.weight[dead] = 0.0
        probe = fitted_probe(features.sites, solution, mean, std)
        benign = [v for v, label in zip(features.responses, harmful, strict=True) if not label]
        return FittedProbe(
            probe, _logit_of_means(probe, benign), config, int(dead.sum()), solution.converged
        )

    def fit_streamed(
        self,
        stream: Stream,
        sites: Sequence[Site],
        n_scores: Sequence[int],
        onset_tokens: Sequence[int | None],
        harmful: Sequence[bool],
    ) -> FittedProbe:
        """Fit as `fit` does, without holding the activations; see `probes.fitting.streaming`."""
        from probes.fitting.streaming import fit_streamed

        return fit_streamed(stream, sites, n_scores, onset_tokens, harmful, self.config)

    def joined(self, sites: Sequence[Site], parts: Mapping[str, Probe]) -> Probe:
        """Put the weights of each part at its own columns, and zeros elsewhere."""
        ordered = sorted_sites(sites)
        weight = torch.zeros(n_features(ordered), len(parts))
        for head, part in enumerate(parts.values()):
            weight[columns_of(ordered, part.sites), head] = part.tensors()["weight"][:, 0]
        bias = torch.cat([part.tensors()["bias"] for part in parts.values()])
        return LinearProbe(ordered, weight, bias, tuple(parts))


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


def _solved(examples: Examples, config: FitConfig) -> Solution:
    assert config.c is not None  # `for_features` has named it
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


def _logit_of_means(probe: LinearProbe, responses: Sequence[NDArray[Any]]) -> tuple[float, ...]:
    """Return `mean_logit`: of a linear map, the logit of a mean is the mean of logits."""
    means = np.stack([np.asarray(v, dtype=np.float32).mean(axis=0) for v in responses])
    logits = probe(torch.from_numpy(means)).double().mean(dim=0)
    return tuple(logits.tolist())


def _mass_mean(examples: Examples) -> Solution:
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
    scale = (high - low) / max(float(within), ABSOLUTE_STD_FLOOR)
    weight = (scale * direction).astype(np.float32)
    return Solution(weight, -scale * (high + low) / 2, True)
