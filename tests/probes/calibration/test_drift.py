"""Live traffic: what changed is told, what did not is left alone."""

from dataclasses import replace

import numpy as np
import pytest

from probes.calibration.drift import check_live
from safe_decode.certificate import Certificate, Envelope
from safe_decode.errors import DataError
from safe_decode.trace.schema import SafetyTrace, TraceEnd, TraceHeader, TraceStep

ENVELOPE = Envelope(max_new_tokens=8, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)
RNG = np.random.default_rng(0)
CERTIFICATE = Certificate.compute(
    RNG.normal(size=2000).tolist(), alpha=0.01, delta=0.05, population="benign", envelope=ENVELOPE
)


def trace(peak, *, bundle="b", certificate="valid", after=None):
    header = TraceHeader(
        "b" if bundle is None else bundle,
        ("harm",),
        0.01,
        "benign",
        CERTIFICATE.threshold,
        certificate,
        "refuse",
        0,
    )
    steps = [TraceStep(0, None, (0.0,), peak, "scan", "below_threshold")]
    if after is not None:  # what a rewound row said afterwards is not its own run
        steps.append(TraceStep(1, 5, (0.0,), after, "watch", "latched", attempt=1))
    return SafetyTrace(header, tuple(steps), TraceEnd("released", 1))


def check(peaks, **options):
    return check_live([trace(peak, **options) for peak in peaks], CERTIFICATE, bundle="b")


def test_traffic_like_the_calibration_is_left_alone():
    calm = [check(np.random.default_rng(seed).normal(size=400)) for seed in range(60)]
    assert sum(bool(one.reasons) for one in calm) <= 4  # two tests at 1 % each
    assert calm[0].verdict == "no sign of change"
    assert calm[0].traces == 400


def test_more_alarms_than_certified_and_a_moved_distribution_are_told():
    peaks = RNG.normal(size=400)
    peaks[:20] = 9.0
    loud = check(peaks)
    assert loud.alarms >= 20
    assert "responses alarm" in loud.reasons[0]
    assert loud.verdict == "calibrate again"
    low = check(RNG.normal(size=400) - 0.5)
    assert "distributed otherwise" in low.reasons[0]
    assert low.median_live < low.median_calibrated


def test_what_cannot_be_compared_is_counted_and_left_out():
    peaks = RNG.normal(size=60)
    traces = [trace(peak) for peak in peaks]
    traces += [trace(9.0, bundle="other"), trace(9.0, certificate="void(cap)"), trace(np.nan)]
    found = check_live(traces, CERTIFICATE, bundle="b")
    assert found.left_out == {
        "of another bundle": 1,
        "outside the certificate": 1,
        "not scored": 1,
    }
    assert found.traces == 60
    assert check(peaks, after=50.0).alarms == found.alarms
    with pytest.raises(DataError, match="none of 1 traces can be compared"):
        check_live(traces[-1:], CERTIFICATE, bundle="b")


def test_few_traces_say_that_they_are_few():
    assert check(RNG.normal(size=10) - 3).verdict == "too few traces to tell"


def test_traces_that_another_certificate_judged_are_left_out():
    """Those of other caps and of begun answers have maxima of their own."""
    other = replace(CERTIFICATE, threshold=7.0)
    short = [trace(9.0) for _ in range(30)]
    short = [replace(one, header=replace(one.header, threshold=7.0)) for one in short]
    calm = [trace(peak) for peak in np.random.default_rng(1).normal(size=400)]
    found = check_live([*calm, *short], CERTIFICATE, bundle="b", others=[other])
    assert found.left_out == {"judged by another certificate": 30} and not found.reasons
    assert check_live([*calm, *short], CERTIFICATE, bundle="b").reasons
