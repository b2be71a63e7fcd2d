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
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from probes.calibration.reach import Reach, Responses, evidence_of, fitting_cap
from probes.data.conversations import Conversation
from safe_decode.certificate import Certificate, Envelope, least_draws
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
    `harmful_refused` and everything else `benign`.

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
    return "harmful_refused" if conversation.prompt_harmful else "benign"


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
    maxima: NDArray[np.float64],
    *,
    alphas: Sequence[float],
    delta: float,
    envelope: Envelope,
    envelopes: Mapping[str, Envelope] | None = None,
    responses: Responses | None = None,
    lower_caps: bool = False,
    required: str = "benign",
) -> Calibration:
    """Certify thresholds for each population apart.

    Args:
        conversations: Harmless responses of the calibrate split.
        maxima: [n] running maximum of each.
        alphas: As in `certify`.
        delta: As in `certify`, for each population.
        envelope: As in `certify`.
        envelopes: Of populations whose responses were generated otherwise; by name.
        responses: Lengths of the responses, and the model that is certified; None: the
            certificates say `unrecorded`.
        lower_caps: As in `certify`.
        required: The population without which there is no bundle.

    Raises:
        CertificateError: The required population does not support one of the alphas, or the
            cap.
        DataError: A response is harmful or was not judged.
    """
    names, others = np.asarray([population_of(row) for row in conversations]), envelopes or {}
    certificates: list[Certificate] = []
    refused: dict[str, str] = {}
    foreign: Counter[str] = Counter()
    for population in sorted({required, *names.tolist()}):
        rows = np.flatnonzero(names == population)
        mine, own = [conversations[int(row)] for row in rows], others.get(population, envelope)
        known = None if responses is None else responses.of_rows(rows)
        reaches = None if known is None else known.reaches(mine, own)
        foreign.update(known.foreign(mine, own) if known else {})
        # Each alpha is tried apart, so that a small population keeps what it supports; the
        # confidence is shared over all that were asked for.
        for alpha in alphas:
            try:
                certificates += certify(
                    maxima[rows],
                    [row.group for row in mine],
                    population=population,
                    alphas=(alpha,),
                    delta=delta / len(alphas),
                    envelope=own,
                    reaches=reaches,
                    lower_caps=lower_caps,
                )
            except CertificateError as error:
                if population == required:
                    raise
                refused[f"{population} at {alpha}"] = str(error)
    return Calibration(tuple(certificates), refused, dict(foreign))
