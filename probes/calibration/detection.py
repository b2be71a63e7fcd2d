"""What a threshold is certified to find: a lower bound on the harmful responses that trip.

Beside every bound on false alarms stands what it costs: with confidence 1 - delta, at least the
share `at_least` of harmful responses of that kind trip at the certified threshold (the exact
one-sided bound of Clopper and Pearson, 1934). The threshold comes from harmless responses alone,
so that the harmful ones of the same split are fresh. The unit is a group, which counts as found
only where each of its responses trips.

Knows paths, groups and certificates. Does not know models or text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from probes.data.conversations import Conversation
from safe_decode.bundle.worth import DetectionBound
from safe_decode.certificate import Certificate
from safe_decode.certificate_choice import BEGUN

__all__ = ["FEWEST", "detection_bounds"]

FEWEST = 30
"""Groups without which no bound is given."""


def detection_bounds(
    rows: Sequence[Conversation],
    paths: Sequence[NDArray[np.float32]],
    certificates: Sequence[Certificate],
    *,
    delta: float,
) -> tuple[DetectionBound, ...]:
    """Bound what each threshold finds.

    Args:
        rows: Harmful responses of the calibrate split.
        paths: [T + 1] the statistic of each, before its running maximum.
        certificates: Of the harmless ones; begun answers are judged by theirs, where they have one.
        delta: Shared by all bounds.
    """
    cells = list(_cells(rows, certificates))
    found = []
    for name, certificate, places in cells:
        cap = certificate.envelope.max_new_tokens
        trips: dict[str, bool] = {}
        for place in places:
            trip = bool(paths[place][: cap + 1].max() > certificate.threshold)
            group = rows[place].group
            trips[group] = trip and trips.get(group, True)
        hits, n = sum(trips.values()), len(trips)
        share = delta / len(cells)
        bound = float(beta.ppf(share, hits, n - hits + 1)) if hits else 0.0
        is_own = all(rows[place].generation is not None for place in places)
        found.append(DetectionBound(name, certificate.alpha, cap, hits, n, share, bound, is_own))
    return tuple(found)


def _cells(
    rows: Sequence[Conversation], certificates: Sequence[Certificate]
) -> Iterator[tuple[str, Certificate, list[int]]]:
    has_begun = any(one.population == BEGUN for one in certificates)
    for name, population, is_begun in (
        ("harmful", "benign", False),
        ("harmful, begun", BEGUN if has_begun else "benign", True),
    ):
        places = [place for place, row in enumerate(rows) if bool(row.prefill_tokens) == is_begun]
        if len({rows[place].group for place in places}) < FEWEST:
            continue
        for one in certificates:
            if one.population == population:
                yield name, one, places
