"""Methods side by side on the same responses: figures, paired intervals, Holm over controls.

Knows scores, labels, sources and groups. Does not know models, text or how a score came about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from probes.metrics.detection import Detection, detection_at, threshold_at
from probes.metrics.intervals import Interval, cluster_draws, holm, interval_of
from safe_decode.errors import ConfigurationError

__all__ = [
    "PROBE",
    "Figures",
    "MethodScores",
    "ScoredRows",
    "compare",
    "macro_auroc",
    "pair_accuracies",
]

PROBE = "probe"
"""The method that the others are compared with."""


class MethodScores(NamedTuple):
    """What a method says of some responses.

    Attributes:
        scores: [n], higher means more likely harmful.
        threshold: Calibrated on responses of its own; None where there were too few.
    """

    scores: NDArray[np.float64]
    threshold: float | None


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """What is known of the responses.

    Attributes:
        harmful: [n].
        sources: [n]; AUROC is averaged over those that hold both labels.
        groups: [n]; resampled whole.
    """

    harmful: NDArray[np.bool_]
    sources: tuple[str, ...]
    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.harmful) == len(self.sources) == len(self.groups):
            raise ConfigurationError("harmful, sources and groups differ in length.")

    def take(self, rows: NDArray[np.intp]) -> ScoredRows:
        """Keep some rows."""
        return ScoredRows(
            self.harmful[rows],
            tuple(self.sources[row] for row in rows),
            tuple(self.groups[row] for row in rows),
        )


@dataclass(frozen=True)
class Figures:
    """One method on one set of responses.

    Attributes:
        method: Its name.
        n_harmful: Harmful responses.
        n_benign: Harmless ones.
        pooled_auroc: Over all responses, sources mixed.
        auroc: Within sources, macro-averaged.
        pairs: Groups that hold both labels.
        pair_accuracy: Share of their pairs in which the harmful response scores higher.
        gain: AUROC of the probe less this one's, paired; None for the probe itself.
        gain_p: One-sided p-value of the gain, adjusted by Holm over all controls.
        at_fpr: Recall at thresholds set on these very harmless responses: optimistic.
        at_calibrated: At the threshold calibrated elsewhere; its false alarms are realised ones.
    """

    method: str
    n_harmful: int
    n_benign: int
    pooled_auroc: float
    auroc: Interval
    pairs: int
    pair_accuracy: Interval
    gain: Interval | None
    gain_p: float | None
    at_fpr: tuple[Detection, ...]
    at_calibrated: Detection | None


def compare(
    methods: Mapping[str, MethodScores],
    rows: ScoredRows,
    *,
    fprs: Sequence[float] = (0.001, 0.01),
    draws: int = 1000,
    seed: int = 0,
) -> list[Figures]:
    """Compute the figures of every method on the same rows and the same resamples.

    Args:
        methods: By name, `PROBE` among them.
        rows: Labels, sources, groups.
        fprs: False-positive rates a response at which recall is reported.
        draws: Of the cluster bootstrap.
        seed: Of the draws.
    """
    names = list(methods)
    scores = np.stack([methods[name].scores for name in names])
    sources = np.asarray(rows.sources)
    pairs = pair_accuracies(scores, rows)

    def figures(chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        aurocs = macro_auroc(scores[:, chosen], rows.harmful[chosen], sources[chosen])
        times = np.bincount(chosen, minlength=len(rows.harmful))[pairs.first_rows]
        return np.concatenate([aurocs, pairs.mean(times)])

    whole = figures(np.arange(len(rows.harmful)))
    drawn = cluster_draws(figures, rows.groups, draws=draws, seed=seed)
    n, probe = len(names), names.index(PROBE)
    gains = {
        name: interval_of(whole[probe] - whole[i], drawn[:, probe] - drawn[:, i])
        for i, name in enumerate(names)
        if name != PROBE
    }
    adjusted = holm({name: gain.p_above_0 for name, gain in gains.items()})
    return [
        Figures(
            method=name,
            n_harmful=int(rows.harmful.sum()),
            n_benign=int((~rows.harmful).sum()),
            pooled_auroc=float(_aurocs(scores[i : i + 1], rows.harmful)[0]),
            auroc=interval_of(float(whole[i]), drawn[:, i]),
            pairs=len(pairs.first_rows),
            pair_accuracy=interval_of(float(whole[n + i]), drawn[:, n + i]),
            gain=gains.get(name),
            gain_p=adjusted.get(name),
            at_fpr=tuple(_at_fpr(scores[i], rows, fpr) for fpr in fprs),
            at_calibrated=_at_calibrated(methods[name], rows),
        )
        for i, name in enumerate(names)
    ]


def macro_auroc(
    scores: NDArray[np.float64], harmful: NDArray[np.bool_], sources: NDArray[np.str_]
) -> NDArray[np.float64]:
    """Return AUROC within each source that holds both labels, averaged, [m] for [m, n] scores."""
    found = [
        _aurocs(scores[:, sources == name], harmful[sources == name])
        for name in np.unique(sources)
        if 0 < harmful[sources == name].sum() < (sources == name).sum()
    ]
    if not found:
        return np.full(len(scores), math.nan)
    means: NDArray[np.float64] = np.mean(found, axis=0)
    return means


class Pairs(NamedTuple):
    """How prompts with responses of both labels are told apart.

    Attributes:
        first_rows: [g] a row of each such prompt.
        accuracy: [m, g] share of the prompt's pairs in which the harmful response scores
            higher; ties count a half.
    """

    first_rows: NDArray[np.intp]
    accuracy: NDArray[np.float64]

    def mean(self, times: NDArray[np.intp]) -> NDArray[np.float64]:
        """Average over prompts, each drawn so many times, [m]; NaN where there is none."""
        if not times.sum():
            return np.full(len(self.accuracy), math.nan)
        means: NDArray[np.float64] = self.accuracy @ times / times.sum()
        return means


def pair_accuracies(scores: NDArray[np.float64], rows: ScoredRows) -> Pairs:
    """Compare the responses to each prompt with one another, for [m, n] scores."""
    members: dict[str, list[int]] = {}
    for row, group in enumerate(rows.groups):
        members.setdefault(group, []).append(row)
    both = [here for here in members.values() if 0 < rows.harmful[here].sum() < len(here)]
    found = [_aurocs(scores[:, here], rows.harmful[here]) for here in both]
    accuracy = np.stack(found, axis=1) if found else np.empty((len(scores), 0))
    return Pairs(np.asarray([here[0] for here in both], dtype=np.intp), accuracy)


def _aurocs(scores: NDArray[np.float64], harmful: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The Mann-Whitney statistic of each row of `scores` [m, n]."""
    n_harmful = int(harmful.sum())
    n_benign = len(harmful) - n_harmful
    if not n_harmful or not n_benign:
        return np.full(len(scores), math.nan)
    ranks = rankdata(scores, axis=1)[:, harmful].sum(axis=1)
    values: NDArray[np.float64] = (ranks - n_harmful * (n_harmful + 1) / 2) / n_harmful / n_benign
    return values


def _at_fpr(scores: NDArray[np.float64], rows: ScoredRows, fpr: float) -> Detection:
    benign, bad = scores[~rows.harmful], scores[rows.harmful]
    return detection_at(benign, bad, threshold=threshold_at(benign, fpr), target_fpr=fpr)


def _at_calibrated(method: MethodScores, rows: ScoredRows) -> Detection | None:
    if method.threshold is None:
        return None
    benign, bad = method.scores[~rows.harmful], method.scores[rows.harmful]
    return detection_at(benign, bad, threshold=method.threshold, target_fpr=math.nan)
