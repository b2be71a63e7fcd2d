"""Controls that need the model: what a probe would score without what it is meant to read.

    prompt probe      the same activations at s_0 alone, before a word was said
    mean embedding    the mean of the response's token embeddings: words without a model
    random weights    the same probe on a copy whose weights are shuffled within each matrix
    shuffled labels   the same probe, fitted to labels that mean nothing
    stacked           TF-IDF and the probe together: what words add to it

Knows activations, embeddings and fits. Does not know figures or tables.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from probes.activations.features import ResponseFeatures
from probes.activations.teacher_forcing import EncodedResponse
from probes.calibration.statistic import maxima, smoothed_paths
from probes.fitting.interface import FitSettings
from probes.fitting.registry import fitter_for
from safe_decode.errors import DataError
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.typing import CausalLM

__all__ = [
    "mean_embedding_scores",
    "prefix_features",
    "prompt_probe_scores",
    "random_weight_copy",
    "refitted_scores",
    "shuffled",
    "stacked_scores",
]

_C = 1.0


def prefix_features(features: ResponseFeatures, tokens: int | None) -> ResponseFeatures:
    """Keep the scores of the first so many tokens, s_0 with them; None keeps all.

    An onset behind the cut is dropped: what is left of such a response counts as harmful from
    its first token on, as its label says.
    """
    if tokens is None:
        return features
    return ResponseFeatures(
        features.sites,
        tuple(values[: tokens + 1] for values in features.responses),
        tuple(o if o is not None and o < tokens else None for o in features.onset_tokens),
    )


def prompt_probe_scores(
    train: ResponseFeatures, harmful: Sequence[bool], test: ResponseFeatures
) -> NDArray[np.float64]:
    """Fit on s_0 and score s_0, [n]: what the prompt alone gives away."""
    first = np.stack([np.asarray(values[0], np.float32) for values in train.responses])
    other = np.stack([np.asarray(values[0], np.float32) for values in test.responses])
    return _regression(first, harmful, other)


def mean_embedding_scores(
    model: CausalLM,
    train: Sequence[EncodedResponse],
    harmful: Sequence[bool],
    test: Sequence[EncodedResponse],
    *,
    tokens: int | None,
) -> NDArray[np.float64]:
    """Fit on the mean token embedding of the response's first tokens, and score it, [n]."""
    weight = model.get_input_embeddings().weight.detach().float().cpu().numpy()

    def means(rows: Sequence[EncodedResponse]) -> NDArray[np.float32]:
        said = [row.ids[row.turn_start :][:tokens] for row in rows]
        return np.stack([weight[list(ids)].mean(0) if ids else weight[0] * 0 for ids in said])

    return _regression(means(train), harmful, means(test))


def refitted_scores(
    train: ResponseFeatures,
    harmful: Sequence[bool],
    test: ResponseFeatures,
    *,
    fit: FitSettings,
    monitor: MonitorConfig,
) -> NDArray[np.float64]:
    """Fit a probe as the bundle's was and score the maximum of its smoothed logit, [n].

    Args:
        train: Activations to fit on.
        harmful: One label a row of `train`.
        test: Activations to score, at the same sites.
        fit: How the bundle's probe was fitted.
        monitor: The bundle's; its smoothing is used, with one head and no offset.
    """
    fitted = fitter_for(fit).fit(train, harmful)
    logits = [fitted.probe(torch.from_numpy(np.asarray(v))) for v in test.responses]
    plain = replace(monitor, start=fitted.benign_mean, offset=(0.0,), scale=(1.0,), low_mark=0.0)
    return maxima(smoothed_paths(logits, plain))


def shuffled(
    features: ResponseFeatures, harmful: Sequence[bool], *, seed: int = 0
) -> tuple[ResponseFeatures, list[bool]]:
    """Deal the labels anew among the rows; onsets would give them away and are dropped."""
    dealt = np.random.default_rng(seed).permutation(np.asarray(harmful, dtype=bool))
    blind = ResponseFeatures(features.sites, features.responses, (None,) * len(features))
    return blind, dealt.tolist()


def random_weight_copy(model: CausalLM, *, seed: int = 0) -> CausalLM:
    """Copy a model and shuffle the entries of every matrix in it.

    Scale and spread stay, and so do norms and biases; what was learnt goes.
    """
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():  # a tied matrix is listed, and shuffled, once
            if weight.ndim >= 2:
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
    return other.eval()


def stacked_scores(
    train_words: NDArray[np.float64],
    train_probe: NDArray[np.float64],
    harmful: Sequence[bool],
    test_words: NDArray[np.float64],
    test_probe: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Join two scores by logistic regression, [n].

    Args:
        train_words: [m] out-of-fold scores of TF-IDF.
        train_probe: [m] maxima of the probe.
        harmful: [m].
        test_words: [n] of TF-IDF fitted on all of train.
        test_probe: [n].
    """
    train = np.stack([train_words, train_probe], axis=1)
    return _regression(train, harmful, np.stack([test_words, test_probe], axis=1))


def _regression(
    train: NDArray[Any], harmful: Sequence[bool], test: NDArray[Any]
) -> NDArray[np.float64]:
    if len(set(harmful)) < 2:
        raise DataError("train must hold harmful and harmless responses; give both.")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=_C, max_iter=1000))
    scores: NDArray[np.float64] = model.fit(train, harmful).decision_function(test)
    return scores
