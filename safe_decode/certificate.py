"""What a threshold promises, and the arithmetic of the promise.

With confidence 1 - delta over the draw of n calibration responses, the true share of
responses of that population whose statistic exceeds the threshold is at most alpha. The
threshold is the (n - j)-th smallest of the n maxima, j the largest integer with
P(Bin(n, alpha) <= j) <= delta: a one-sided tolerance limit (Wilks, 1941), free of
assumptions on the distribution; ties only make it safer. The cap up to which it speaks is
what the responses support, see `evidence`.

Knows numbers. Does not know models, tensors or how a maximum came about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from safe_decode.errors import CertificateError, ConfigurationError
from safe_decode.evidence import UNRECORDED, Evidence

__all__ = [
    "Certificate",
    "Envelope",
    "certified_rank",
    "certified_threshold",
    "least_draws",
]


def certified_rank(n: int, alpha: float, delta: float) -> int:
    """Find j, how many of n calibration responses may lie above the threshold.

    Args:
        n: Calibration responses, one an independently drawn prompt group.
        alpha: Share of responses that may alarm, in (0, 1).
        delta: Chance that the draw misleads, in (0, 1).

    Returns:
        The largest j with P(Bin(n, alpha) <= j) <= delta.

    Raises:
        CertificateError: n is too small for any j; the message says how many more.
        ConfigurationError: alpha or delta outside (0, 1), or a negative n.
    """
    _require_share("alpha", alpha)
    _require_share("delta", delta)
    if n < 0:
        raise ConfigurationError(f"n={n} is negative; pass the number of calibration responses.")
    wanted = least_draws(alpha, delta)
    if n < wanted:
        raise CertificateError(
            f"n={n} responses cannot certify alpha={alpha:g} at delta={delta:g}, wanted at least "
            f"{wanted}; collect {wanted - n} more or certify a larger alpha."
        )
    cumulative, j = 0.0, -1
    while True:
        cumulative += _binomial_mass(n, j + 1, alpha)
        if cumulative > delta:
            return j
        j += 1


def certified_threshold(maxima: Sequence[float], alpha: float, delta: float) -> float:
    """Return the threshold; an alarm is statistic > threshold.

    Args:
        maxima: One a calibration response, in any order: its statistic's maximum over time.
        alpha: As in `certified_rank`.
        delta: As in `certified_rank`.

    Raises:
        CertificateError: Too few maxima, or one is not finite.
    """
    j = certified_rank(len(maxima), alpha, delta)
    bad = sum(not math.isfinite(value) for value in maxima)
    if bad:
        raise CertificateError(
            f"maxima hold {bad} NaN or infinite values, wanted none; a response that cannot be "
            "scored cannot be left out either, so mend its cause."
        )
    return float(sorted(maxima)[len(maxima) - j - 1])


@dataclass(frozen=True, slots=True)
class Envelope:
    """How the certified responses were generated; other calls void the certificate.

    Attributes:
        max_new_tokens: The cap; a lower one stays inside.
        do_sample: Sampled, or greedy.
        temperature: Of the sampling; without meaning if greedy.
        top_p: Share of probability that sampling keeps; without meaning if greedy.
        top_k: Tokens that sampling keeps, 0 for all; without meaning if greedy.
        options: Every further option that was in force and moves responses, as JSON by its name;
            see `engines.transformers.coverage.record_of`. One that is not there had its neutral
            value.
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    options: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A threshold with what it promises and what it was computed from.

    Attributes:
        alpha: Largest share of the population's responses that alarm.
        delta: Chance, over the calibration draw, that the share is larger.
        n: Calibration responses.
        j: How many of them lie above the threshold at most.
        threshold: An alarm is statistic > threshold.
        population: Of which responses it speaks: "benign", "hard_negative", ...
        envelope: How they were generated.
        maxima: [n] finite, the statistic's maximum of each response.
        evidence: Who wrote the responses, and how far they reach.
        dtype: Number format of the model in which the maxima were measured, as
            `bundle.number_format` names it; None: that of the bundle which it is put into.
    """

    alpha: float
    delta: float
    n: int
    j: int
    threshold: float
    population: str
    envelope: Envelope
    maxima: tuple[float, ...]
    evidence: Evidence = UNRECORDED
    dtype: str | None = None

    @property
    def supported_cap(self) -> int | None:
        """The largest cap that the responses support; None where it is not recorded."""
        return self.evidence.supported_cap(least_draws(self.alpha, self.delta))

    def status(self, void: str | None) -> str:
        """Say in a trace whether the certificate speaks of a row.

        Args:
            void: Why it does not; None: it does.
        """
        if void is not None:
            return f"void({void})"
        return "valid(off-policy)" if self.evidence.source == "off-policy" else "valid"

    @classmethod
    def compute(
        cls,
        maxima: Sequence[float],
        *,
        alpha: float,
        delta: float,
        population: str,
        envelope: Envelope,
        evidence: Evidence = UNRECORDED,
        dtype: str | None = None,
    ) -> Certificate:
        """Certify a threshold from calibration maxima.

        Raises:
            CertificateError: As in `certified_threshold`; or the envelope's cap is above what
                the evidence supports.
        """
        certificate = cls(
            alpha=alpha,
            delta=delta,
            n=len(maxima),
            j=certified_rank(len(maxima), alpha, delta),
            threshold=certified_threshold(maxima, alpha, delta),
            population=population,
            envelope=envelope,
            maxima=tuple(float(value) for value in maxima),
            evidence=evidence,
            dtype=dtype,
        )
        certificate.verify_cap()
        return certificate

    def verify(self) -> None:
        """Recompute everything from the maxima and the lengths.

        Raises:
            CertificateError: n, j or the threshold is not what the maxima yield, or the cap is
                above what the lengths support.
        """
        wanted = {
            "n": len(self.maxima),
            "j": certified_rank(len(self.maxima), self.alpha, self.delta),
            "threshold": certified_threshold(self.maxima, self.alpha, self.delta),
        }
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise CertificateError(
                    f"{name}={getattr(self, name)} of the certificate for {self.population!r} at "
                    f"alpha={self.alpha:g}, delta={self.delta:g} is not {value}, which its "
                    f"{len(self.maxima)} maxima yield; calibrate again."
                )
        self.verify_cap()

    def verify_cap(self) -> None:
        """Recompute the cap from the lengths, where they are recorded.

        Raises:
            CertificateError: There is not one length a maximum, or the envelope's cap is above
                what they support.
        """
        supported = self.supported_cap
        if supported is None:
            return
        if len(self.evidence.lengths) != len(self.maxima):
            raise CertificateError(
                f"lengths are recorded of {len(self.evidence.lengths)} responses and maxima of "
                f"{len(self.maxima)}, wanted one each; calibrate again."
            )
        cap = self.envelope.max_new_tokens
        if cap > supported:
            own = self.evidence.source == "on-policy"
            why = (
                "each was generated under at least this cap"
                if own
                else f"{least_draws(self.alpha, self.delta)} of them reach it, as many as "
                f"alpha={self.alpha:g} at delta={self.delta:g} needs"
            )
            raise CertificateError(
                f"max_new_tokens={cap} is not supported for {self.population!r}: the "
                f"{len(self.maxima)} responses ({self.evidence.in_words}) support at most "
                f"{supported}: {why}. Pass max_new_tokens={supported} or less, or calibrate on "
                "responses that the model itself generated under the larger cap, with "
                "`safe-decode rollout`."
            )


def _require_share(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigurationError(f"{name}={value} is outside (0, 1); pass a share such as 0.01.")


def least_draws(alpha: float, delta: float) -> int:
    """Count the responses without which no threshold is certified: (1 - alpha)^n <= delta."""
    # (1 - alpha)^n <= delta; log1p keeps small alphas exact. The loop mends rounding at the edge.
    n = math.ceil(math.log(delta) / math.log1p(-alpha))
    while math.exp(n * math.log1p(-alpha)) > delta:
        n += 1
    return n


def _binomial_mass(n: int, k: int, p: float) -> float:
    if k > n:
        return 1.0  # beyond the support: the caller's sum is complete
    log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p))
