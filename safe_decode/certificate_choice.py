"""Which of a bundle's certificates decides: by level, population, number format and length.

A bundle may certify several caps. The threshold of a small cap is lower, since a response that is
short has fewer occasions to alarm, so a call takes the smallest cap that covers it. What decides is
known before the first token: the cap, and whether the answer's beginning was supplied.

Knows certificates. Does not know bundles, models or requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from safe_decode.certificate import Certificate
from safe_decode.errors import CertificateError

__all__ = ["BEGUN", "CertificateChoice", "certificate_of"]

BEGUN = "begun"
"""Population of the harmless responses whose beginning was supplied; where a bundle certifies it,
it decides for every call that supplies one."""


@dataclass(frozen=True, slots=True)
class CertificateChoice:
    """What a guard chooses a call's certificate from.

    Attributes:
        certificates: Of a bundle.
        population: Whose responses the operator mostly serves.
        dtype: Number format of the model.
    """

    certificates: tuple[Certificate, ...]
    population: str
    dtype: str | None

    def of_call(
        self, alpha: float, *, tokens: int | None = None, prefill_tokens: int = 0
    ) -> Certificate:
        """Return the certificate that decides for a call.

        Args:
            alpha: The level.
            tokens: New ones at most, with those decoded unseen behind them; None: no cap.
            prefill_tokens: Of the answer, supplied.

        Raises:
            CertificateError: As `certificate_of`.
        """
        whole = None if tokens is None else tokens + prefill_tokens
        population = self.population
        if prefill_tokens and self._certifies_begun(alpha):
            population = BEGUN
        return certificate_of(self.certificates, alpha, population, self.dtype, whole)

    @property
    def longest(self) -> dict[float, Certificate]:
        """The certificate of the largest cap, for each level of the population."""
        mine = [c for c in self.certificates if c.population == self.population]
        return {c.alpha: self.of_call(c.alpha) for c in mine if c.dtype == self.dtype}

    def _certifies_begun(self, alpha: float) -> bool:
        return self.population == "benign" and any(
            c.population == BEGUN and c.dtype == self.dtype and math.isclose(c.alpha, alpha)
            for c in self.certificates
        )


def certificate_of(
    certificates: Sequence[Certificate],
    alpha: float,
    population: str,
    dtype: str | None = None,
    tokens: int | None = None,
) -> Certificate:
    """Find the certificate of a level, a population and a number format.

    Args:
        certificates: Among which it is looked for.
        alpha: The level.
        population: Whose responses it speaks of.
        dtype: Number format; None: any.
        tokens: Of a response at most, unseen ones and a supplied beginning included. Of several
            caps the smallest that covers them is taken, whose threshold is the tightest; where
            none does, or for None, the largest.

    Raises:
        CertificateError: There is none; those that are there, are named.
    """
    measured = [c for c in certificates if dtype is None or c.dtype == dtype]
    found = sorted(
        (c for c in measured if c.population == population and math.isclose(c.alpha, alpha)),
        key=lambda one: one.envelope.max_new_tokens,
    )
    if found:
        covering = (c for c in found if tokens is not None and tokens <= c.envelope.max_new_tokens)
        return next(covering, found[-1])
    levels = sorted({c.alpha for c in measured if c.population == population})
    where = "" if dtype is None or len(measured) == len(certificates) else f" in {dtype}"
    raise CertificateError(
        f"alpha={alpha:g} is not certified for {population!r}{where}, wanted one of "
        f"{levels or 'none: this population has no certificate'}; pass one of these or calibrate."
    )
