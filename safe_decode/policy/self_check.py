"""The second stage: on an alarm, the model is asked to look at what it has said.

Knows a probe on the last token of the assistant header, put once more behind a row's ids,
and how often a row may be asked. Does not know monitors, policies or loops.

The forward serves the guard alone: the session's tap does not record it, it uses no cache,
draws nothing and changes nothing of the row. An alarm that is cleared stays latched in the
monitor; the next look comes `every_tokens` scores later, until the row's looks are spent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from safe_decode.activations.tap import ActivationTap, unwatched
from safe_decode.certificate import Certificate
from safe_decode.certificate_choice import certificate_of
from safe_decode.errors import CertificateError, ConfigurationError
from safe_decode.probe.interface import Probe
from safe_decode.typing import CausalLM

__all__ = ["HeaderCheck", "Look", "SelfCheck", "SelfChecker", "looks_due"]


@dataclass(frozen=True)
class SelfCheck:
    """When an alarm is confirmed by a look, and when it is cleared.

    Attributes:
        probe: Reads the last token of a header put behind the row; its largest logit counts.
        threshold: An alarm is confirmed iff a look exceeds this, and cleared otherwise. The
            scalar to certify is the maximum over a response's looks, with the first stage
            fixed before.
        every_tokens: Scores from a look to the next.
        max_looks: Looks a response may have; an alarm after the last one is confirmed.

    Raises:
        ConfigurationError: A threshold that is NaN, or a count below 1.
    """

    probe: Probe
    threshold: float
    every_tokens: int = 16
    max_looks: int = 4

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ConfigurationError("threshold of the self-check is NaN; pass a number.")
        if self.every_tokens < 1 or self.max_looks < 1:
            raise ConfigurationError(
                f"every_tokens={self.every_tokens} and max_looks={self.max_looks} must be at "
                "least 1; leave self_check out to have none."
            )


@dataclass(frozen=True, eq=False)
class HeaderCheck:
    """A second stage that was made and certified with a bundle.

    Attributes:
        probe: As of a `SelfCheck`.
        first_threshold: Of the first stage, fixed before `certificates` were drawn.
        certificates: For the largest header logit over a response's looks; one an alpha. A
            response whose looks are spent counts as above any threshold.
        every_tokens: As of a `SelfCheck`.
        max_looks: As of a `SelfCheck`.

    Raises:
        ConfigurationError: A first threshold that is not finite, or counts below 1.
        CertificateError: A certificate does not recompute, or there is none.
    """

    probe: Probe
    first_threshold: float
    certificates: tuple[Certificate, ...]
    every_tokens: int = 16
    max_looks: int = 4

    def __post_init__(self) -> None:
        if not math.isfinite(self.first_threshold):
            raise ConfigurationError(
                f"first_threshold={self.first_threshold} is not finite; fix it on select."
            )
        if not self.certificates:
            raise CertificateError("the self-check has no certificate; calibrate it.")
        for certificate in self.certificates:
            certificate.verify()
            self.settings(certificate.alpha, certificate.dtype)

    def certificate(self, alpha: float, dtype: str | None = None) -> Certificate:
        """Return the certificate of a level.

        Args:
            alpha: The level.
            dtype: Number format of the model; None: any.

        Raises:
            CertificateError: This level is not certified; those that are, are named.
        """
        return certificate_of(self.certificates, alpha, "benign", dtype)

    def settings(self, alpha: float, dtype: str | None = None) -> SelfCheck:
        """Return the check of a level. Raises as `certificate`."""
        return SelfCheck(
            self.probe,
            self.certificate(alpha, dtype).threshold,
            every_tokens=self.every_tokens,
            max_looks=self.max_looks,
        )


def looks_due(first: int, n_scores: int, every_tokens: int, max_looks: int) -> list[int] | None:
    """List the scores of the looks of a response all of whose alarms are cleared.

    Args:
        first: Score of its first alarm that a look could follow.
        n_scores: Scores of the response.
        every_tokens: From a look to the next.
        max_looks: How many there may be.

    Returns:
        Indices; None where one more would be due than there may be: then it trips.
    """
    due = list(range(first, n_scores, every_tokens))
    return due if len(due) <= max_looks else None


@dataclass(frozen=True)
class Look:
    """One look.

    Attributes:
        score: Index of the row's score at which it was taken.
        logit: Largest logit of the header's last token; NaN if the look failed.
        is_cleared: Whether the alarm was cleared.
    """

    score: int
    logit: float
    is_cleared: bool


class SelfChecker:
    """Takes the looks of one call.

    Args:
        check: When and by what.
        model: The protected model.
        tap: On the check's probe's sites.
        header: Ids of the assistant's header.
        starts: [batch] first column of each row that is no padding.
        thresholds: [batch] instead of the check's own; None: the check's for all.

    Attributes:
        looks: Each row's looks so far.
    """

    def __init__(
        self,
        check: SelfCheck,
        model: CausalLM,
        tap: ActivationTap,
        *,
        header: Sequence[int],
        starts: Sequence[int],
        thresholds: Sequence[float] | None = None,
    ) -> None:
        self._thresholds = thresholds
        self.looks: dict[int, list[Look]] = {}
        self._check, self._model, self._tap = check, model, tap
        self._header, self._starts = tuple(header), tuple(starts)

    def clears(self, row: int, ids: Sequence[int], score: int) -> bool:
        """Say whether an alarm of a row is cleared.

        Args:
            row: Which row.
            ids: Its columns, padding included, up to the token that the newest score judged.
            score: Index of that score.
        """
        past = self.looks.setdefault(row, [])
        if past and (not past[-1].is_cleared or score - past[-1].score < self._check.every_tokens):
            return past[-1].is_cleared
        if len(past) >= self._check.max_looks:
            return False
        logit = self._logit([*ids[self._starts[row] :], *self._header])
        # NaN is not at most anything: what cannot be judged is not cleared.
        threshold = self._check.threshold if self._thresholds is None else self._thresholds[row]
        past.append(Look(score, logit, logit <= threshold))
        return past[-1].is_cleared

    def _logit(self, ids: Sequence[int]) -> float:
        try:
            with unwatched(), self._tap.listening() as beats, torch.no_grad():
                beats.keep_last(1)
                whole = torch.tensor([list(ids)], device=self._model.device)
                self._model(input_ids=whole, use_cache=False)
                return float(self._check.probe(beats.take()[:, -1]).max())
        except Exception:  # a look that fails clears nothing; the alarm then stands
            return math.nan
