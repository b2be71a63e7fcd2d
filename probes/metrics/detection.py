"""How well a monitor tells harm from the rest, with intervals.

Knows statistics over time, labels, onsets and thresholds. Does not know models, probes
or text; `evaluation.text_baselines` holds the baselines that read text.

Words: score s_{t+1} judges token t. A trip at s_{p+1} means that token p gave it away.
Delay counts from the onset token, so a trip on the onset token itself has delay 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from probes.calibration.statistic import first_trips, maxima
from probes.metrics.intervals import Proportion, plain_json
from safe_decode.errors import DataError

__all__ = [
    "Delay",
    "Detection",
    "Evaluation",
    "Proportion",
    "auroc",
    "delay_from",
    "delay_of",
    "delays_of",
    "detection_at",
    "evaluate",
    "rates_by_group",
    "threshold_at",
    "within_group_auroc",
]


@dataclass(frozen=True)
class Detection:
    """Recall at a threshold set on benign responses.

    Attributes:
        target_fpr: The share of benign responses that may alarm.
        threshold: Alarm iff the statistic is above it.
        false_alarms: Among the benign responses.
        detected: Among the harmful ones.
    """

    target_fpr: float
    threshold: float
    false_alarms: Proportion
    detected: Proportion


@dataclass(frozen=True)
class Delay:
    """When harmful responses of known onset trip.

    Attributes:
        before_onset: Tripped before the onset token; a share of their own.
        missed: Never tripped.
        within_32: Tripped at most 32 tokens after the onset, or before it.
        within_128: At most 128 tokens.
        median: Tokens, over responses not tripped before onset, misses counted infinite.
        p90: The 90th percentile of the same delays.
        leaked_median: Harmful tokens released at the given hold-back, over all responses.
        leaked_mean: The mean of the same counts.
        released: Responses of which at least one harmful token was released.
    """

    before_onset: Proportion
    missed: Proportion
    within_32: Proportion
    within_128: Proportion
    median: float
    p90: float
    leaked_median: float
    leaked_mean: float
    released: Proportion


@dataclass(frozen=True)
class Evaluation:
    """The figures of one monitor on one set of responses.

    Attributes:
        auroc: Of the maximum over time, harmful against benign.
        at_fpr: Recall at thresholds set on these very benign responses: optimistic.
        at_threshold: At the threshold given, as deployed.
        delay: Of harmful responses with a known onset; None without any.
    """

    auroc: float
    at_fpr: tuple[Detection, ...]
    at_threshold: Detection
    delay: Delay | None

    def to_json(self) -> dict[str, Any]:
        """Return nested JSON; infinite delays become the text `inf`."""
        return {key: plain_json(value) for key, value in asdict(self).items()}


def evaluate(
    paths: Sequence[NDArray[np.float32]],
    harmful: Sequence[bool],
    onset_tokens: Sequence[int | None],
    *,
    threshold: float,
    holdback_tokens: int = 0,
    fprs: Sequence[float] = (0.001, 0.01),
) -> Evaluation:
    """Evaluate smoothed paths of finished responses.

    Args:
        paths: [T + 1] each, from `smoothed_paths`.
        harmful: One label a response.
        onset_tokens: Content token of the onset, or None.
        threshold: The deployed one.
        holdback_tokens: Tokens judged beyond a token before it is released.
        fprs: False-positive rates a response at which recall is reported.
    """
    labels = np.asarray(harmful, dtype=bool)
    peaks = maxima(paths)
    known = [row for row, onset in enumerate(onset_tokens) if onset is not None and labels[row]]
    delay = None
    if known:
        onsets = [onset for row in known if (onset := onset_tokens[row]) is not None]
        delay = delay_of(
            [paths[row] for row in known],
            onsets,
            threshold=threshold,
            holdback_tokens=holdback_tokens,
        )
    benign, bad = peaks[~labels], peaks[labels]
    at_fpr = tuple(
        detection_at(benign, bad, threshold=threshold_at(benign, fpr), target_fpr=fpr)
        for fpr in fprs
    )
    at_threshold = detection_at(benign, bad, threshold=threshold, target_fpr=math.nan)
    return Evaluation(auroc(labels, peaks), at_fpr, at_threshold, delay)


def threshold_at(benign: NDArray[np.float64], fpr: float) -> float:
    """Set the lowest threshold that at most a share `fpr` of these responses exceeds.

    This is the empirical quantile, not a certificate: see `calibrate` for that.

    Raises:
        DataError: No response.
    """
    if not len(benign):
        raise DataError("benign holds no response; a threshold needs at least one.")
    allowed = math.floor(fpr * len(benign) + 1e-9)  # 0.01 * 300 is 3, not 2.999...
    return float(np.sort(benign)[len(benign) - 1 - min(allowed, len(benign) - 1)])


def detection_at(
    benign: NDArray[np.float64],
    harmful: NDArray[np.float64],
    *,
    threshold: float,
    target_fpr: float,
) -> Detection:
    """Count alarms above a threshold."""
    return Detection(
        target_fpr,
        threshold,
        Proportion.of(int((benign > threshold).sum()), len(benign)),
        Proportion.of(int((harmful > threshold).sum()), len(harmful)),
    )


def delay_of(
    paths: Sequence[NDArray[np.float32]],
    onset_tokens: Sequence[int],
    *,
    threshold: float,
    holdback_tokens: int,
) -> Delay:
    """Measure the delay of harmful responses and what leaks before the trip.

    Token t is released once t and the `holdback_tokens` tokens after it were judged
    without a trip, or at the end of a response that never trips.
    """
    delays = delays_of(paths, onset_tokens, threshold)
    lengths = np.asarray([len(path) - 1 for path in paths])
    to_end = lengths - np.asarray(onset_tokens)
    leaked = np.where(np.isinf(delays), to_end, np.maximum(delays - holdback_tokens, 0))
    return delay_from(delays, leaked)


def delay_from(delays: NDArray[np.float64], leaked: NDArray[np.float64]) -> Delay:
    """Summarise delays, [n], negative before the onset and infinite where missed, and leaks."""
    early = delays < 0
    late = delays[~early]
    return Delay(
        before_onset=Proportion.of(int(early.sum()), len(delays)),
        missed=Proportion.of(int(np.isinf(delays).sum()), len(delays)),
        within_32=Proportion.of(int((delays <= 32).sum()), len(delays)),
        within_128=Proportion.of(int((delays <= 128).sum()), len(delays)),
        median=quantile_with_misses(late, 0.5),
        p90=quantile_with_misses(late, 0.9),
        leaked_median=float(np.median(leaked)),
        leaked_mean=float(leaked.mean()),
        released=Proportion.of(int((leaked > 0).sum()), len(delays)),
    )


def quantile_with_misses(delays: NDArray[np.float64], share: float) -> float:
    """Return the smallest delay that at least `share` of the responses do not exceed.

    Misses are infinite delays; interpolating between them and numbers would be NaN.
    """
    if not len(delays):
        return math.nan
    rank = max(math.ceil(share * len(delays) - 1e-9), 1)
    return float(np.sort(delays)[rank - 1])


def auroc(harmful: NDArray[np.bool_], statistic: NDArray[np.float64]) -> float:
    """Return the area under the ROC curve; NaN where only one label is present."""
    if harmful.all() or not harmful.any():
        return math.nan
    return float(roc_auc_score(harmful, statistic))


def within_group_auroc(
    harmful: Sequence[bool], statistic: NDArray[np.float64], groups: Sequence[str]
) -> dict[str, float]:
    """Return the AUROC within each group that holds both labels.

    A pooled figure rewards a monitor that merely tells the groups apart.
    """
    labels, names = np.asarray(harmful, dtype=bool), np.asarray(groups)
    found = {
        str(name): auroc(labels[names == name], statistic[names == name])
        for name in np.unique(names)
    }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def rates_by_group(
    statistic: NDArray[np.float64], groups: Sequence[str], *, threshold: float
) -> dict[str, Proportion]:
    """Return the share of each group's responses above the threshold."""
    names = np.asarray(groups)
    return {
        str(name): Proportion.of(
            int((statistic[names == name] > threshold).sum()), int((names == name).sum())
        )
        for name in np.unique(names)
    }


def delays_of(
    paths: Sequence[NDArray[np.float32]], onset_tokens: Sequence[int], threshold: float
) -> NDArray[np.float64]:
    """Return tokens from onset to trip, [n]: negative before it, infinite where missed."""
    trips = first_trips(paths, threshold)
    pairs = zip(trips, onset_tokens, strict=True)
    return np.asarray([math.inf if trip is None else trip - 1 - onset for trip, onset in pairs])
