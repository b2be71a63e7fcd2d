"""Choose the strength of the penalty by responses left out, whole groups at a time.

Knows folds and a figure of merit. Does not know how a probe is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from probes.activations.features import ResponseFeatures
from probes.fitting.interface import FitSettings, mean_logit
from probes.fitting.registry import fitter_for, require_abilities
from safe_decode.errors import ConfigurationError, DataError

__all__ = ["ChosenC", "choose_c", "cross_validated_auroc"]


class ChosenC(NamedTuple):
    """A penalty and what the others came to.

    Attributes:
        c: The smallest of the best: of equals, the strongest penalty.
        aurocs: Of every candidate.
    """

    c: float
    aurocs: Mapping[float, float]


def choose_c(
    features: ResponseFeatures,
    harmful: Sequence[bool],
    groups: Sequence[str],
    config: FitSettings,
    *,
    grid: Sequence[float],
    folds: int = 4,
) -> ChosenC:
    """Choose C by AUROC on groups left out.

    Args:
        features: Of responses.
        harmful: One label a response.
        groups: Of each response.
        config: How to fit, but for `c`; of a kind with a penalty.
        grid: Candidates.
        folds: As in `cross_validated_auroc`.

    Raises:
        ConfigurationError: The grid is empty, or the kind has no penalty.
        DataError: As in `cross_validated_auroc`.
    """
    if not grid:
        raise ConfigurationError("grid is empty; pass at least one C.")
    require_abilities((config,), ("penalty",))
    ways: dict[float, Any] = {c: {"c": c} for c in grid}
    aurocs = {
        c: cross_validated_auroc(features, harmful, groups, replace(config, **own), folds=folds)
        for c, own in ways.items()
    }
    return ChosenC(min(aurocs, key=lambda c: (-aurocs[c], c)), aurocs)


def cross_validated_auroc(
    features: ResponseFeatures,
    harmful: Sequence[bool],
    groups: Sequence[str],
    config: FitSettings,
    *,
    folds: int = 4,
) -> float:
    """Score a configuration by AUROC of the mean logit of responses left out by group.

    Args:
        features: Of responses.
        harmful: One label a response.
        groups: Responses of one group are left out together.
        config: How to fit.
        folds: How many parts; the mean over parts that hold both labels is returned.

    Raises:
        DataError: No part holds both labels, or there are fewer groups than parts.
    """
    if len(set(groups)) < folds:
        raise DataError(f"{len(set(groups))} groups make no {folds} parts; give more groups.")
    labels = np.asarray(harmful, dtype=bool)
    scores = []
    for train, held_out in GroupKFold(folds).split(labels, labels, groups):
        if len(set(labels[held_out])) < 2 or len(set(labels[train])) < 2:
            continue
        fitted = fitter_for(config).fit(
            features.take(train),
            labels[train].tolist(),
            groups=[groups[row] for row in train],
        )
        means = [mean_logit(fitted.probe, [features.responses[row]])[0] for row in held_out]
        scores.append(float(roc_auc_score(labels[held_out], means)))
    if not scores:
        raise DataError(f"no part of {folds} holds both labels; give more groups of each.")
    return float(np.mean(scores))
