"""Fit without storing activations: pass after pass over a stream that computes them anew.

The losses and the standardisation are those of `linear`, summed batch by batch, so memory is
bounded by a batch of the stream and by what `pooled` keeps: one mean a segment. Every step
of the optimiser costs a pass: time is paid for memory.

Knows sums over batches. Does not know where activations come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from probes.activations.features import ResponseFeatures, Segment, label_spans
from probes.fitting.examples import Standardisation, evenly, standardisation_of
from probes.fitting.interface import FittedProbe, Stream
from probes.fitting.linear import FitConfig, LinearProbeFitter, fitted_probe
from probes.fitting.windowed_loss import Solution, Windows
from safe_decode.activations.site import Site, n_features, sorted_sites
from safe_decode.errors import NonFiniteError

__all__ = ["fit_streamed"]


class _Batch:
    """Rows of the segments of some responses, one after the other."""

    def __init__(self, parts: Sequence[NDArray[np.float32]], segments: Sequence[Segment]) -> None:
        self.rows = np.concatenate(parts)
        if not np.isfinite(self.rows).all():
            raise NonFiniteError("an activation is NaN or infinite; compute in float32.")
        self.sizes = np.asarray([len(part) for part in parts])
        self.harmful = np.asarray([segment.harmful for segment in segments])
        self.weight = np.asarray([segment.weight for segment in segments])
        self.row_weights = np.repeat(self.weight / self.sizes, self.sizes)


def fit_streamed(
    stream: Stream,
    sites: Sequence[Site],
    n_scores: Sequence[int],
    onset_tokens: Sequence[int | None],
    harmful: Sequence[bool],
    config: FitConfig,
) -> FittedProbe:
    """Fit a probe as `LinearProbeFitter` does, without holding the activations.

    Args:
        stream: See `Stream`.
        sites: Whose features it yields.
        n_scores: T + 1 of each response.
        onset_tokens: Onset of each, or None.
        harmful: One label a response.
        config: How to fit.

    Raises:
        ConfigurationError: Labels or onsets do not fit the responses.
        DataError: All labels are equal, or every feature is dead.
        NonFiniteError: An activation is NaN or infinite.
    """
    ordered = sorted_sites(sites)
    config = config.for_features(n_features(ordered))
    segments = label_spans(n_scores, onset_tokens, harmful, before_onset=config.before_onset)
    if config.method == "pooled":
        return _pooled(stream, ordered, segments, harmful, config)
    passes = _Passes(stream, segments, config)
    standard = passes.standardisation(n_features(ordered))
    if config.method == "mass_mean":
        solution = passes.mass_mean(standard)
    else:
        solution = passes.minimum(standard)
    solution.weight[standard.dead] = 0.0
    probe = fitted_probe(ordered, solution, standard.mean, standard.std)
    total = np.zeros(n_features(ordered))
    benign = 0
    for batch in stream():
        for row, values in batch:
            if not harmful[row]:
                total += np.asarray(values, np.float32).mean(axis=0)
                benign += 1
    mean = torch.from_numpy((total / benign).astype(np.float32))
    start = tuple(probe(mean[None])[0].double().tolist())
    return FittedProbe(probe, start, config, int(standard.dead.sum()), solution.converged)


def _pooled(
    stream: Stream,
    sites: tuple[Site, ...],
    segments: Sequence[Segment],
    harmful: Sequence[bool],
    config: FitConfig,
) -> FittedProbe:
    """Keep the mean of each segment and of each harmless response: one pass."""
    by_row = _by_row(segments)
    means: dict[int, list[NDArray[np.float32]]] = {}
    for batch in stream():
        for row, values in batch:
            whole = np.asarray(values, np.float32)
            means[row] = [whole[s.start : s.stop].mean(axis=0) for s in by_row[row]]
    # One position a segment: a harmful response with a known onset has two.
    rows = [np.stack(means[row]) for row in range(len(harmful))]
    spans = [
        segment._replace(start=place, stop=place + 1)
        for row in range(len(harmful))
        for place, segment in enumerate(by_row[row])
    ]
    features = ResponseFeatures(sites, tuple(rows), (None,) * len(rows))
    return LinearProbeFitter(config).fit_segments(features, spans, harmful)


class _Passes:
    """What one pass over the stream can sum."""

    def __init__(self, stream: Stream, segments: Sequence[Segment], config: FitConfig) -> None:
        self._stream, self._config = stream, config
        self._by_row = _by_row(segments)
        self._total = sum(segment.weight for segment in segments)

    def _batches(self) -> Iterator[_Batch]:
        most = self._config.tokens_per_response
        for batch in self._stream():
            parts, found = [], []
            for row, values in batch:
                for segment in self._by_row[row]:
                    part = np.asarray(values[segment.start : segment.stop], dtype=np.float32)
                    if self._config.method == "token":
                        part = part[evenly(len(part), most)]
                    parts.append(part)
                    found.append(segment)
            if parts:
                yield _Batch(parts, found)

    def standardisation(self, width: int) -> Standardisation:
        """Sum means, then squares around them: two passes, exact where means are large."""
        mean = np.zeros(width)
        for batch in self._batches():
            mean += batch.row_weights @ batch.rows
        mean /= self._total
        square = np.zeros(width)
        for batch in self._batches():
            square += batch.row_weights @ np.square(batch.rows - mean)
        return standardisation_of(mean, square / self._total)

    def mass_mean(self, standard: Standardisation) -> Solution:
        """Sum the two means, then the spread along their difference."""
        sums = np.zeros((2, len(standard.mean)))
        weights = np.zeros(2)
        for batch in self._batches():
            rows = _standardised(batch, standard)
            labels = np.repeat(batch.harmful, batch.sizes)
            for label in (0, 1):
                own = batch.row_weights * (labels == label)
                sums[label] += own @ rows
                weights[label] += own.sum()
        low_mean, high_mean = sums / weights[:, None]
        direction = high_mean - low_mean
        low, high = float(low_mean @ direction), float(high_mean @ direction)
        within = 0.0
        for batch in self._batches():
            labels = np.repeat(batch.harmful, batch.sizes)
            away = _standardised(batch, standard) @ direction - np.where(labels, high, low)
            within += float(batch.row_weights @ np.square(away))
        scale = (high - low) / max(within / self._total, 1e-7)
        return Solution((scale * direction).astype(np.float32), -scale * (high + low) / 2, True)

    def minimum(self, standard: Standardisation) -> Solution:
        """Minimise by L-BFGS, one pass an evaluation."""
        weight = torch.zeros(len(standard.mean), requires_grad=True)
        bias = torch.zeros((), requires_grad=True)
        most = self._config.max_iterations
        optimiser = torch.optim.LBFGS(
            [weight, bias],
            max_iter=most,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            optimiser.zero_grad()
            assert self._config.c is not None  # `for_features` has named it
            penalty = weight.double().square().sum() / (2 * self._config.c * self._total)
            penalty.backward()  # type: ignore[no-untyped-call]
            value = float(penalty.detach())
            for batch in self._batches():
                inputs = torch.from_numpy(_standardised(batch, standard))
                loss = self._loss(batch, inputs @ weight + bias) / self._total
                loss.backward()  # type: ignore[no-untyped-call]
                value += float(loss.detach())
            return value

        with torch.enable_grad():
            optimiser.step(closure)  # type: ignore[no-untyped-call]
        iterations = optimiser.state[weight]["n_iter"]
        return Solution(weight.detach().numpy(), float(bias.detach()), iterations < most)

    def _loss(self, batch: _Batch, logits: Tensor) -> Tensor:
        if self._config.method == "windowed":
            windows = Windows.over(
                batch.sizes, batch.harmful, batch.weight, width=self._config.window
            )
            return windows.loss(logits, self._config.tau)
        targets = torch.from_numpy(np.repeat(batch.harmful, batch.sizes).astype(np.float64))
        weights = torch.from_numpy(batch.row_weights)
        return functional.binary_cross_entropy_with_logits(
            logits.double(), targets, weights, reduction="sum"
        )


def _standardised(batch: _Batch, standard: Standardisation) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = (batch.rows - standard.mean) / standard.std
    rows[:, standard.dead] = 0.0
    return rows


def _by_row(segments: Sequence[Segment]) -> dict[int, list[Segment]]:
    found: dict[int, list[Segment]] = {}
    for segment in segments:
        found.setdefault(segment.row, []).append(segment)
    return found
