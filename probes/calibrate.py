"""From statistics of benign responses to certified thresholds.

The unit of a certificate is one response to one independently drawn prompt group:
several responses of a group count once, by their maximum. Everything else is frozen
before the first of these responses is looked at.

Knows populations, groups and how several certificates share a confidence. The bound
itself is in `safe_decode.certificate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probes.conversations import Conversation
from safe_decode.certificate import Certificate, Envelope
from safe_decode.errors import CertificateError, ConfigurationError, DataError

__all__ = ["Calibration", "certify", "certify_populations", "group_maxima", "population_of"]


@dataclass(frozen=True)
class Calibration:
    """The certificates that a set of responses supports.

    Attributes:
        certificates: One for each population and alpha that n supports.
        refused: Why others were not given, by `population at alpha`.
    """

    certificates: tuple[Certificate, ...]
    refused: dict[str, str]


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

    Raises:
        CertificateError: There are too few groups for an alpha; it says how many more.
    """
    drawn = group_maxima(maxima, groups)
    share = delta / max(len(alphas), 1)
    return tuple(
        Certificate.compute(
            drawn.tolist(), alpha=alpha, delta=share, population=population, envelope=envelope
        )
        for alpha in alphas
    )


def certify_populations(
    conversations: Sequence[Conversation],
    maxima: NDArray[np.float64],
    *,
    alphas: Sequence[float],
    delta: float,
    envelope: Envelope,
    envelopes: Mapping[str, Envelope] | None = None,
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
        required: The population without which there is no bundle.

    Raises:
        CertificateError: The required population does not support one of the alphas.
        DataError: A response is harmful or was not judged.
    """
    names = np.asarray([population_of(row) for row in conversations])
    certificates: list[Certificate] = []
    refused: dict[str, str] = {}
    for population in sorted({required, *names.tolist()}):
        rows = np.flatnonzero(names == population)
        groups = [conversations[int(row)].group for row in rows]
        # Each alpha is tried apart, so that a small population keeps what it supports; the
        # confidence is shared over all that were asked for.
        for alpha in alphas:
            try:
                certificates += certify(
                    maxima[rows],
                    groups,
                    population=population,
                    alphas=(alpha,),
                    delta=delta / len(alphas),
                    envelope=(envelopes or {}).get(population, envelope),
                )
            except CertificateError as error:
                if population == required:
                    raise
                refused[f"{population} at {alpha}"] = str(error)
    return Calibration(tuple(certificates), refused)
