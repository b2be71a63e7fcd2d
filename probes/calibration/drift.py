"""Does live traffic still look like what was calibrated on?

A certificate speaks of responses drawn as those of the calibration. Traces of live responses
are compared with the maxima that the bundle stores: the share that alarms, and the whole
distribution below the threshold. Above it nothing is compared, since a row that trips is cut
off there, and what would have followed is not known.

Alarms on live traffic are not all false: harm raises them too. More alarms than alpha means
that something changed, not what.

Knows traces and certificates. Does not know models or text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom, ks_2samp

from safe_decode.certificate import Certificate
from safe_decode.errors import DataError
from safe_decode.trace.schema import SafetyTrace

__all__ = ["LEAST_TRACES", "LiveCheck", "check_live"]

LEAST_TRACES = 50
"""Fewer say nothing of a distribution."""

_SIGNIFICANCE = 0.01
# Among many traces the slightest drift is significant; one that moves less than this share of
# the responses past each other changes no threshold worth the name.
_LEAST_DISTANCE = 0.05


@dataclass(frozen=True)
class LiveCheck:
    """What the comparison found.

    Attributes:
        traces: Compared.
        left_out: Others, by reason.
        alarms: Traces whose statistic exceeded the threshold.
        alpha: What was certified.
        p_alarms: Chance of so many alarms or more were their share alpha.
        distance: Kolmogorov-Smirnov distance of the maxima, cut at the threshold.
        p_distance: Its p value.
        median_live: Of the maxima.
        median_calibrated: Of the maxima.
        reasons: Why to calibrate again; empty: no sign that one should.
        is_enough: Whether there were enough traces to tell.
    """

    traces: int
    left_out: dict[str, int]
    alarms: int
    alpha: float
    p_alarms: float
    distance: float
    p_distance: float
    median_live: float
    median_calibrated: float
    reasons: tuple[str, ...]
    is_enough: bool

    @property
    def verdict(self) -> str:
        """Say in a word or two what to do."""
        if self.reasons:
            return "calibrate again"
        return "no sign of change" if self.is_enough else "too few traces to tell"

    def to_json(self) -> dict[str, Any]:
        """Return the figures and the verdict."""
        names = ("traces", "left_out", "alarms", "alpha", "p_alarms", "distance", "p_distance")
        rest = {"reasons": list(self.reasons), "verdict": self.verdict}
        medians = {
            "median_live": self.median_live,
            "median_calibrated": self.median_calibrated,
        }
        return {name: getattr(self, name) for name in names} | medians | rest


def check_live(
    traces: Sequence[SafetyTrace],
    certificate: Certificate,
    *,
    bundle: str,
    others: Sequence[Certificate] = (),
) -> LiveCheck:
    """Compare live traces with a certificate.

    Args:
        traces: Of responses as they come; a row's own run is compared, not what followed a trip.
        certificate: The one in force.
        bundle: Digest of the bundle that holds it.
        others: Those of other caps, and of begun answers; traces that they judged are left out.

    Raises:
        DataError: No trace is of this bundle and inside its certificate.
    """
    live, left_out = _statistics(traces, bundle, others)
    threshold = certificate.threshold
    found = np.minimum(np.asarray(live), threshold)
    stored = np.minimum(np.asarray(certificate.maxima), threshold)
    alarms = int((np.asarray(live) > threshold).sum())
    p_alarms = float(binom.sf(alarms - 1, len(live), certificate.alpha))
    test = ks_2samp(found, stored, method="asymp")
    distance, p_distance = float(test.statistic), float(test.pvalue)
    is_enough = len(live) >= LEAST_TRACES
    reasons = []
    if p_alarms < _SIGNIFICANCE:
        reasons.append(
            f"{alarms} of {len(live)} responses alarm, more than {certificate.alpha:g} explains "
            f"(p={p_alarms:.2g}): harm, or other traffic than was calibrated on"
        )
    if is_enough and p_distance < _SIGNIFICANCE and distance >= _LEAST_DISTANCE:
        reasons.append(
            f"the statistic's maxima are distributed otherwise (distance {distance:.3f}, "
            f"p={p_distance:.2g})"
        )
    if left_out["outside the certificate"] > len(live):
        reasons.append("most responses are outside the certificate; certify how they are made")
    return LiveCheck(
        traces=len(live),
        left_out=dict(left_out),
        alarms=alarms,
        alpha=certificate.alpha,
        p_alarms=p_alarms,
        distance=distance,
        p_distance=p_distance,
        median_live=float(np.median(live)),
        median_calibrated=float(np.median(certificate.maxima)),
        reasons=tuple(reasons),
        is_enough=is_enough,
    )


def _statistics(
    traces: Sequence[SafetyTrace], bundle: str, others: Sequence[Certificate]
) -> tuple[list[float], Counter[str]]:
    """Take the largest statistic of each trace that can be compared, and count the others."""
    left_out: Counter[str] = Counter()
    live = []
    judged = {(one.population, one.threshold) for one in others}
    for trace in traces:
        reason = _left_out(trace, bundle, judged)
        if reason is None:
            live.append(max(step.statistic for step in trace.steps if step.attempt == 0))
        else:
            left_out[reason] += 1
    if not live:
        raise DataError(
            f"none of {len(traces)} traces can be compared ({dict(left_out)}); pass traces of "
            f"bundle {bundle[:12]} inside its certificate."
        )
    return live, left_out


def _left_out(trace: SafetyTrace, bundle: str, others: Collection[tuple[str, float]]) -> str | None:
    if trace.header.bundle != bundle:
        return "of another bundle"
    if not trace.header.certificate.startswith("valid"):
        return "outside the certificate"
    if (trace.header.population, trace.header.threshold) in others:
        return "judged by another certificate"
    own = [step.statistic for step in trace.steps if step.attempt == 0]
    if not own or not np.isfinite(own).all():
        return "not scored"
    return None
