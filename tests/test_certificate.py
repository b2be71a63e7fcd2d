"""The binomial is right, and the promise holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from safe_decode.certificate import Certificate, Envelope, certified_rank, certified_threshold
from safe_decode.errors import CertificateError, ConfigurationError

ENVELOPE = Envelope(max_new_tokens=256, do_sample=True, temperature=0.7, top_p=0.9, top_k=0)


@pytest.mark.parametrize(
    ("n", "alpha", "j"),
    [
        (299, 0.01, 0),
        (1_000, 0.01, 4),
        (3_000, 0.01, 20),
        (5_000, 0.01, 38),
        (2_995, 0.001, 0),
        (10_000, 0.001, 4),
    ],
)
def test_known_ranks(n: int, alpha: float, j: int) -> None:
    assert certified_rank(n, alpha, 0.05) == j


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("n", [1, 2, 50, 299, 1_234, 40_000])
def test_the_rank_is_the_largest_that_the_binomial_allows(
    n: int, alpha: float, delta: float
) -> None:
    if binom.cdf(0, n, alpha) > delta:
        with pytest.raises(CertificateError):
            certified_rank(n, alpha, delta)
        return
    j = certified_rank(n, alpha, delta)
    assert binom.cdf(j, n, alpha) <= delta < binom.cdf(j + 1, n, alpha)


def test_too_few_responses_say_how_many_more() -> None:
    with pytest.raises(CertificateError, match="wanted at least 299; collect 49 more"):
        certified_rank(250, 0.01, 0.05)
    with pytest.raises(CertificateError, match="wanted at least 2995; collect 1 more"):
        certified_rank(2_994, 0.001, 0.05)


def test_a_count_that_is_none_is_told_from_one_that_is_too_small() -> None:
    with pytest.raises(ConfigurationError, match="n=-1 is negative"):
        certified_rank(-1, 0.01, 0.05)
    with pytest.raises(CertificateError, match="n=0 responses cannot certify"):
        certified_rank(0, 0.01, 0.05)


def test_a_chance_that_equals_delta_is_allowed() -> None:
    assert certified_rank(1, 0.5, 0.5) == 0


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_shares_outside_the_open_interval_are_refused(share: float) -> None:
    with pytest.raises(ConfigurationError, match="alpha="):
        certified_rank(1_000, share, 0.05)
    with pytest.raises(ConfigurationError, match="delta="):
        certified_rank(1_000, 0.01, share)


def test_exactly_j_maxima_lie_above_the_threshold() -> None:
    maxima = np.random.default_rng(0).permutation(1_000).astype(float).tolist()
    threshold = certified_threshold(maxima, 0.01, 0.05)
    assert threshold == 995.0
    assert sum(value > threshold for value in maxima) == 4


def test_maxima_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CertificateError, match="maxima hold 1 NaN or infinite"):
        certified_threshold([*range(998), float("nan"), 3.0], 0.01, 0.05)


@pytest.mark.parametrize("distribution", ["uniform", "heavy", "tied"])
def test_the_promise_holds_over_calibration_draws(distribution: str) -> None:
    """At most delta of the draws have a true alarm rate above alpha."""
    alpha, delta, n, draws = 0.05, 0.1, 200, 4_000
    rng = np.random.default_rng(7)
    uniform = rng.random((draws, n))
    grid = 40
    values = {
        "uniform": uniform,
        "heavy": np.tan(np.pi * (uniform - 0.5)),
        "tied": np.floor(uniform * grid) / grid,
    }[distribution]
    thresholds = np.array([certified_threshold(row.tolist(), alpha, delta) for row in values])
    true_rate = {
        "uniform": 1 - thresholds,
        "heavy": 0.5 - np.arctan(thresholds) / np.pi,
        "tied": 1 - thresholds - 1 / grid,
    }[distribution]
    broken = float((true_rate > alpha).mean())
    exact = binom.cdf(certified_rank(n, alpha, delta), n, alpha)
    three_errors = 3 * (delta * (1 - delta) / draws) ** 0.5
    assert broken <= delta + three_errors
    if distribution != "tied":  # and it is not idle: the bound is met as the binomial says
        assert broken == pytest.approx(exact, abs=three_errors)


def test_a_certificate_recomputes_and_a_changed_one_does_not() -> None:
    maxima = np.random.default_rng(1).normal(size=1_000).tolist()
    certificate = Certificate.compute(
        maxima, alpha=0.01, delta=0.05, population="benign", envelope=ENVELOPE
    )
    certificate.verify()
    assert (certificate.n, certificate.j) == (1_000, 4)
    for change in ({"threshold": 0.0}, {"j": 5}, {"n": 999}, {"maxima": certificate.maxima[1:]}):
        with pytest.raises(CertificateError, match="maxima yield; calibrate again"):
            replace(certificate, **change).verify()
