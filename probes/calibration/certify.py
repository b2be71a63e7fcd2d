"""From statistics of benign responses to certified thresholds.

The unit of a certificate is one response to one independently drawn prompt group:
several responses of a group count once, by their maximum. Everything else is frozen
before the first of these responses is looked at.

Knows populations, groups and how several certificates share a confidence. The bound itself is
in `safe_decode.certificate`; who wrote the responses and how far they reach, in `reach`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from probes.calibration.reach import Reach, Responses, evidence_of, fitting_cap
from probes.data.conversations import Conversation
from safe_decode.certificate import Certificate, Envelope, least_draws
from safe_decode.certificate_choice import BEGUN
from safe_decode.errors import CertificateError, ConfigurationError, DataError
from safe_decode.evidence import UNRECORDED

__all__ = ["Calibration", "certify", "certify_populations", "group_maxima", "population_of"]


@dataclass(frozen=True)
class Calibration:
    """The certificates that a set of responses supports.

    Attributes:
        certificates: One for each population and alpha that n supports.
        refused: Why others were not given, by `population at alpha`.
        foreign: Responses that the certified model did not write, by the reason.
    """

    certificates: tuple[Certificate, ...]
    refused: dict[str, str]
    foreign: dict[str, int] = field(default_factory=dict)


def population_of(conversation: Conversation) -> str:
    """Name the population of a response that does no harm.

    `meta["population"]` decides where it is given; otherwise a refused harmful request is
    `harmful_refused`, an answer whose beginning was supplied `begun`, everything else `benign`.

    Raises:
        DataError: The response is harmful or was not judged.
    """
    if conversation.response_harmful is not False:
        raise DataError(
            f"a response of group {conversation.group!r} is harmful or not judged; thresholds "
            "are calibrated on responses judged harmless."
        )
    named = conversation.meta.get("population")
    if named is not None:
        return str(named)
    if conversation.prompt_harmful:
        return "harmful_refused"
    return BEGUN if conversation.prefill_tokens else "benign"


def group_maxima(maxima: NDArray[np.float64], groups: Sequence[str]) -> NDArray[np.float64]:
    """Reduce statistics to one a group, its maximum, in order of first appearance.

    Args:
        maxima: [n] running maximum of each response.
        groups: Group of each response.
    """
    if len(maxima) != len(groups):
        raise ConfigurationError(
            f"{len(maxima)} statistics have {len(groups)} groups; pass one group each."
        )
    largest: dict[str, float] = {}
    for value, group in zip(maxima.tolist(), groups, strict=True):
        largest[group] = max(value, largest.get(group, value))
    return np.asarray(list(largest.values()), dtype=np.float64)


def certify(
    maxima: NDArray[np.float64],
    groups: Sequence[str],
    *,
    population: str,
    alphas: Sequence[float],
    delta: float,
    envelope: Envelope,
    reaches: Sequence[Reach] | None = None,
    lower_caps: bool = False,
) -> tuple[Certificate, ...]:
    """Certify thresholds for one population.

    Several alphas share the confidence: each gets delta / m, so all of them hold together
    with confidence 1 - delta.

    Args:
        maxima: [n] running maximum of each response.
        groups: Group of each response.
        population: Which responses these are.
        alphas: Wanted bounds on the share of responses that alarm.
        delta: Chance, over the draw of these responses, that a bound does not hold.
        envelope: How the responses were generated.
        reaches: Of each response, see `reach`; None: the certificates say `unrecorded`.
        lower_caps: Lower a cap that the responses do not support, rather than refuse it.

    Raises:
        CertificateError: There are too few groups for an alpha; it says how many more. Or the
            envelope's cap is above what the responses support.
    """
    drawn = group_maxima(maxima, groups)
    share = delta / max(len(alphas), 1)
    evidence = UNRECORDED if reaches is None else evidence_of(reaches, groups)
    found = []
    for alpha in alphas:
        own = envelope
        if lower_caps and len(drawn) >= least_draws(alpha, share):
            own = fitting_cap(envelope, evidence, least_draws(alpha, share))
        found.append(
            Certificate.compute(
                drawn.tolist(),
                alpha=alpha,
                delta=share,
                population=population,
                envelope=own,
                evidence=evidence,
            )
        )
    return tuple(found)


def certify_populations(
    conversations: Sequence[Conversation],
    paths: Sequence[NDArray[np.float32]],
    *,
    alphas: Sequence[float],
    delta: float,
    envelope: Envelope,
    envelopes: Mapping[str, Envelope] | None = None,
    caps: Sequence[int] = (),
    responses: Responses | None = None,
    lower_caps: bool = False,
    required: str = "benign",
) -> Calibration:
    """Certify thresholds for each population apart, up to several caps.

    Alphas and caps share the confidence. Under a smaller cap a response would have been a part of
    itself. Begun answers reach differently far: each cap is certified on those that reach it.

    Args:
        conversations: Harmless responses of the calibrate split.
        paths: [T + 1] the statistic of each before its running maximum, see `smoothed_paths`.
        alphas: As in `certify`.
        delta: As in `certify`, for each population.
        envelope: As in `certify`, with the largest cap.
        envelopes: Of populations whose responses were generated otherwise; by name.
        caps: Smaller caps to certify beside it; those that are not smaller are passed over.
        responses: What is known of them; None: certificates say `unrecorded`.
        lower_caps: As in `certify`.
        required: The population without which there is no bundle.

    Raises:
        CertificateError: The required population does not support one of the alphas, or the
            largest cap.
        DataError: A response is harmful or was not judged.
    """
    names, others = np.asarray([population_of(row) for row in conversations]), envelopes or {}
    certificates, refused, foreign = list[Certificate](), dict[str, str](), Counter[str]()
    for population in sorted({required, *names.tolist()}):
        rows = np.flatnonzero(names == population)
        mine, own = [conversations[int(row)] for row in rows], others.get(population, envelope)
        known = None if responses is None else responses.of_rows(rows)
        foreign.update(known.foreign(mine, own) if known else {})
        reaches = known.reaches(mine, own) if known else None
        if population == BEGUN and BEGUN not in others and reaches and lower_caps:
            own = replace(own, max_new_tokens=max(one.reach for one in reaches))
        drawn = _Drawn(
            population,
            [row.group for row in mine],
            [paths[int(row)] for row in rows],
            reaches,
            lower_caps=lower_caps,
        )
        wanted = [*sorted({cap for cap in caps if cap < own.max_new_tokens}), own.max_new_tokens]
        share = delta / (len(alphas) * len(wanted))
        for alpha in alphas:
            found, why = drawn.certified(alpha, share, own, wanted, population == required)
            certificates += found
            refused |= why
    return Calibration(tuple(certificates), refused, dict(foreign))


@dataclass(frozen=True)
class _Drawn:
    """The responses of one population."""

    population: str
    groups: Sequence[str]
    paths: Sequence[NDArray[np.float32]]
    reaches: Sequence[Reach] | None
    lower_caps: bool

    def certified(
        self,
        alpha: float,
        delta: float,
        envelope: Envelope,
        caps: Sequence[int],
        is_required: bool,
    ) -> tuple[list[Certificate], dict[str, str]]:
        """Try each cap apart, so that a small population keeps what it supports.

        Returns:
            The certificates, of the largest cap first, and why others were not given.
        """
        found: list[Certificate] = []
        refused: dict[str, str] = {}
        for cap in reversed(caps):
            if found and cap >= found[-1].envelope.max_new_tokens:
                continue  # the responses support no more than was certified just now
            is_largest = cap == envelope.max_new_tokens
            try:
                found.append(self.up_to(cap, alpha, delta, envelope))
            except CertificateError as error:
                if is_required and is_largest:
                    raise
                where = "" if is_largest else f" up to {cap} tokens"
                refused[f"{self.population} at {alpha}{where}"] = str(error)
        return found, refused

    def up_to(self, cap: int, alpha: float, delta: float, envelope: Envelope) -> Certificate:
        """Certify what the first `cap` tokens of each response say."""
        rows, reaches = list(range(len(self.groups))), self.reaches
        if self.population == BEGUN and reaches is not None:
            if self.lower_caps:
                furthest = sorted((one.reach for one in reaches), reverse=True)
                needed = least_draws(alpha, delta)
                cap = min(cap, furthest[min(needed, len(furthest)) - 1])
            rows = [row for row in rows if reaches[row].reach >= cap]
        (found,) = certify(
            np.asarray([self.paths[row][: cap + 1].max() for row in rows], np.float64),
            [self.groups[row] for row in rows],
            population=self.population,
            alphas=(alpha,),
            delta=delta,
            envelope=replace(envelope, max_new_tokens=cap),
            reaches=None if reaches is None else [reaches[row].up_to(cap) for row in rows],
            lower_caps=self.lower_caps,
        )
        return found
