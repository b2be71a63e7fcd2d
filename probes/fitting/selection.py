"""Choose among fitted probes and monitors on the select split.

Knows how a monitor is set up from logits and how candidates are ranked. Does not open
the calibrate split: the threshold used here only estimates the certified one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.calibration.statistic import first_trips, maxima, smoothed_paths
from probes.fitting.boundary import spent_evenly
from probes.fitting.late_harm import late_recall
from probes.fitting.statistics import StatisticChoice
from probes.metrics.detection import auroc, delay_of, threshold_at
from safe_decode.certificate_choice import BEGUN
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.monitor.monitor import MonitorConfig

__all__ = [
    "ChosenMonitor",
    "SelectSet",
    "choose_holdback",
    "monitor_for",
    "score_monitor",
]

_LOW_MARK_SHARE = 0.75
_SCALE_FLOOR = 1e-6
# A population smaller than this has no quantile of its own worth a threshold.
_SMALLEST_POPULATION = 50


@dataclass(frozen=True, eq=False)
class SelectSet:
    """Labels of the select split, in the order of the logits.

    Attributes:
        harmful: One label a response.
        onset_tokens: Onset of each, or None.
        populations: Of each response. Of harmful ones only whether it is `begun` is used, since
            begun answers are judged by a threshold of their own.
    """

    harmful: tuple[bool, ...]
    onset_tokens: tuple[int | None, ...]
    populations: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.harmful)) < 2:
            raise DataError("select holds only one label; give harmful and harmless responses.")
        if not len(self.harmful) == len(self.onset_tokens) == len(self.populations):
            raise ConfigurationError("harmful, onset_tokens and populations differ in length.")

    @property
    def benign_rows(self) -> NDArray[np.intp]:
        """Positions of the harmless responses."""
        return np.flatnonzero(~np.asarray(self.harmful))


@dataclass(frozen=True)
class ChosenMonitor:
    """A monitor and how it did on the select split.

    Attributes:
        monitor: Smoothing, start, offset, scale and low mark.
        threshold: The estimate used here.
        tpr: Harmful responses that trip at it.
        late_tpr: The same behind a long harmless answer, spliced from scores: a statistic that
            remembers everything is blind there. Where no harmless answer is long, `tpr`.
        auroc: Of the maximum over time.
        delay_p90: Tokens; NaN without known onsets.
        holdback_tokens: From the delay quantile.
    """

    monitor: MonitorConfig
    threshold: float
    tpr: float
    late_tpr: float
    auroc: float
    delay_p90: float
    holdback_tokens: int

    def rank(self) -> tuple[float, float, float]:
        """Order candidates: recall first, then how soon, then the rest of the ROC curve.

        Recall is rounded to a tenth of a per cent: below that, select cannot tell.
        """
        delay = math.inf if math.isnan(self.delay_p90) else self.delay_p90
        return (round(self.recall, 3), -delay, self.auroc)

    @property
    def recall(self) -> float:
        """What candidates are compared by: harm from the start and harm that comes late, alike."""
        return (self.tpr + self.late_tpr) / 2

    def to_json(self) -> dict[str, Any]:
        """Return the figures for the bundle's provenance."""
        finite = math.isfinite(self.delay_p90)
        monitor = self.monitor
        return {
            "statistic": monitor.kind,
            "smoothing": monitor.smoothing,
            "window": monitor.window,
            "best": monitor.best,
            "drift": monitor.drift,
            "hits": monitor.hits,
            "even": bool(monitor.boundary),
            "threshold": self.threshold,
            "tpr": self.tpr,
            "late_tpr": self.late_tpr,
            "auroc": self.auroc,
            # None: no onset is known. "missed": more than a tenth never trips.
            "delay_p90": self.delay_p90 if finite else _without_a_number(self.delay_p90),
            "holdback_tokens": self.holdback_tokens,
        }


def _without_a_number(delay: float) -> str | None:
    return None if math.isnan(delay) else "missed"


def monitor_for(
    logits: Sequence[Tensor],
    benign_rows: NDArray[np.intp],
    *,
    start: tuple[float, ...],
    smoothing: float = 1.0,
    choice: StatisticChoice | None = None,
) -> MonitorConfig:
    """Set up a monitor so that its statistic is in benign standard deviations.

    Offset and scale of a level are mean and standard deviation of its maximum over harmless
    responses, which makes heads, and the levels of a bank, comparable. The low mark is a quantile
    of the smoothed statistic over harmless positions: text below it is unremarkable.

    Args:
        logits: [T + 1, K] of every response of select.
        benign_rows: Which of them are harmless.
        start: [K] where the statistic starts.
        smoothing: EMA weight of the newest logit, where there is no choice.
        choice: The statistic; None: a moving average of this smoothing.
    """
    benign = [logits[row] for row in benign_rows]
    spread = float(torch.cat(benign).std(dim=0).mean())
    offset, scale = [], []
    parts = (choice,) if choice is None else choice.levels
    for part, (head, first) in product(parts, enumerate(start)):
        # Hysteresis joins heads before it counts: each head is scaled without it.
        plain = replace(_monitor((first,), (0.0,), (1.0,), spread, smoothing, part), hits=1)
        peaks = maxima(smoothed_paths([row[:, head : head + 1] for row in benign], plain))
        offset.append(float(peaks.mean()))
        scale.append(max(float(peaks.std()), _SCALE_FLOOR))
    config = _monitor(start, tuple(offset), tuple(scale), spread, smoothing, choice)
    if choice is not None and choice.even:
        found = spent_evenly(smoothed_paths(benign, config))
        config = replace(config, boundary_at=found.at, boundary=found.heights)
    values = np.concatenate(smoothed_paths(benign, replace(config, hits=1)))
    return replace(config, low_mark=float(np.quantile(values, _LOW_MARK_SHARE)))


def _monitor(
    start: tuple[float, ...],
    offset: tuple[float, ...],
    scale: tuple[float, ...],
    spread: float,
    smoothing: float,
    choice: StatisticChoice | None,
) -> MonitorConfig:
    if choice is None:
        return MonitorConfig(smoothing, start, offset, scale, 0.0)
    return choice.monitor(start, offset, scale, spread)


def score_monitor(
    logits: Sequence[Tensor],
    labels: SelectSet,
    *,
    start: tuple[float, ...],
    fpr: float,
    holdback_share: float,
    most_holdback_tokens: int,
    smoothing: float = 1.0,
    choice: StatisticChoice | None = None,
) -> ChosenMonitor:
    """Set up a monitor for a probe's logits and measure it at a fixed response FPR.

    The threshold keeps the rate in every population of harmless responses, so a monitor
    that merely reads the prompt is not chosen for its recall. Begun answers have their own, as
    they will have when they are served. The low mark is set so that in `holdback_share` of the
    harmful responses nothing behind the onset counts as clear.
    """
    config = monitor_for(
        logits, labels.benign_rows, start=start, smoothing=smoothing, choice=choice
    )
    paths = smoothed_paths(logits, config)
    harmful = np.asarray(labels.harmful)
    threshold, begun_threshold = _thresholds(maxima(paths), labels, fpr)
    # From here on begun answers are compared with the same threshold as all.
    above = begun_threshold - threshold
    paths = [
        path - np.float32(above) if name == BEGUN else path
        for path, name in zip(paths, labels.populations, strict=True)
    ]
    peaks = maxima(paths)
    known = [
        (paths[row], onset)
        for row, onset in enumerate(labels.onset_tokens)
        if onset is not None and harmful[row]
    ]
    p90, holdback = math.nan, most_holdback_tokens
    if known:
        known_paths, onsets = [path for path, _ in known], [onset for _, onset in known]
        p90 = delay_of(known_paths, onsets, threshold=threshold, holdback_tokens=0).p90
        holdback = choose_holdback(
            known_paths,
            onsets,
            threshold=threshold,
            share=holdback_share,
            most=most_holdback_tokens,
        )
    lows = _lows_before_trips(known, threshold)
    surely_clear = (
        float(np.quantile(lows, 1 - holdback_share, method="lower")) if lows else math.inf
    )
    monitor = replace(config, low_mark=min(config.low_mark, threshold, surely_clear))
    tpr = float((peaks[harmful] > threshold).mean())
    begun = np.asarray(labels.populations) == BEGUN
    limits = np.where(begun, begun_threshold, threshold)
    late = late_recall(logits, harmful, labels.onset_tokens, config, limits)
    late = tpr if late is None else late
    return ChosenMonitor(monitor, threshold, tpr, late, auroc(harmful, peaks), p90, holdback)


def _lows_before_trips(
    known: Sequence[tuple[NDArray[np.float32], int]], threshold: float
) -> list[float]:
    """Return the lowest value from the onset to the trip of each harmful response that trips late.

    Harm that is judged where a sentence ends leaves the statistic low until then. Whatever lies
    under the low mark is called clear and said to the reader, so the mark must lie below these.
    """
    lows = []
    for path, onset in known:
        (trip,) = first_trips([path], threshold)
        between = path[onset + 1 : trip]
        if trip is not None and len(between):
            lows.append(float(between.min()))
    return lows


def choose_holdback(
    paths: Sequence[NDArray[np.float32]],
    onset_tokens: Sequence[int],
    *,
    threshold: float,
    share: float,
    most: int,
) -> int:
    """Find the smallest hold-back at which a share of harmful responses leaks nothing.

    Token t is released once the hold-back after it is judged, so a trip `d` tokens after
    the onset leaks nothing at a hold-back of d. Responses that never trip cannot be held
    by any hold-back; they count, and the result is at most `most`.
    """
    trips = first_trips(paths, threshold)
    delays = sorted(
        math.inf if trip is None else max(trip - 1 - onset, 0)
        for trip, onset in zip(trips, onset_tokens, strict=True)
    )
    wanted = delays[max(math.ceil(share * len(delays)) - 1, 0)]
    return int(min(wanted, most))


def _thresholds(peaks: NDArray[np.float64], labels: SelectSet, fpr: float) -> tuple[float, float]:
    """Return the threshold of all but begun answers, and that of begun ones."""
    rows = labels.benign_rows
    names = np.asarray(labels.populations)[rows]
    begun = peaks[rows[names == BEGUN]]
    has_own = len(begun) >= _SMALLEST_POPULATION and (names != BEGUN).any()
    if has_own:
        rows, names = rows[names != BEGUN], names[names != BEGUN]
    threshold = threshold_at(peaks[rows], fpr)
    for name in np.unique(names):
        own = peaks[rows[names == name]]
        if len(own) >= _SMALLEST_POPULATION:
            threshold = max(threshold, threshold_at(own, fpr))
    return threshold, threshold_at(begun, fpr) if has_own else threshold
