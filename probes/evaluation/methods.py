"""Scores of every method on the same responses, read up to the same token.

Knows which method reads what, and makes encodings and activations once. Does not know
thresholds, labels of what is scored, or figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from probes.activations.features import ResponseFeatures
from probes.activations.harvest import harvest, score_responses
from probes.activations.teacher_forcing import EncodedResponse, encode_response, onset_token
from probes.calibration.statistic import maxima, smoothed_paths
from probes.data.conversations import Conversation
from probes.evaluation.model_baselines import (
    mean_embedding_scores,
    prefix_features,
    prompt_probe_scores,
    random_weight_copy,
    refitted_scores,
    shuffled,
    stacked_scores,
)
from probes.evaluation.text_baselines import Control, control_scores, out_of_fold_scores
from probes.fitting.interface import FitSettings
from probes.metrics.comparison import PROBE
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["Methods", "truncated"]

_TEXT_CONTROLS: Mapping[str, Control] = {
    "source only": "source",
    "length only": "length",
    "TF-IDF of the prompt": "tfidf_prompt",
    "TF-IDF of the response": "tfidf_response",
    "TF-IDF of prompt + response": "tfidf_prompt_response",
}


class Methods:
    """Encodings, activations and scores of the rows of one evaluation, each made once.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        bundle: Whose probe and monitor are compared.
        train: Judged rows that controls are fitted on; none: the probe stands alone.
        scored: Rows that are scored.
        fit: How probes of the controls are fitted.
        seed: Of shuffled labels and random weights.
        model_controls: Whether controls that need forwards of their own are run.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        bundle: ProbeBundle,
        train: Sequence[Conversation],
        scored: Sequence[Conversation],
        *,
        fit: FitSettings,
        seed: int = 0,
        model_controls: bool = True,
    ) -> None:
        self._model, self._tokenizer, self._bundle = model, tokenizer, bundle
        self._fit, self._seed, self._with_model = fit, seed, model_controls
        self._train = [row for row in train if row.response_harmful is not None]
        self._labels = [bool(row.response_harmful) for row in self._train]
        self._scored = list(scored)
        self.encoded = [encode_response(tokenizer, row) for row in self._scored]
        self._train_encoded = [encode_response(tokenizer, row) for row in self._train]
        self._features: dict[str, tuple[ResponseFeatures, ResponseFeatures]] = {}
        self._train_paths: list[NDArray[np.float32]] | None = None

    def onsets(self, rows: Sequence[Conversation]) -> tuple[int | None, ...]:
        """Find the onset tokens of the first rows scored."""
        pairs = zip(rows, self.encoded, strict=False)
        return tuple(onset_token(self._tokenizer, row, ids) for row, ids in pairs)

    def paths(self, rows: Sequence[Conversation] | None = None) -> list[NDArray[np.float32]]:
        """Score with the bundle's own probe and monitor, in float32."""
        probe = self._bundle.probe.to(next(self._model.parameters()).device)
        chosen = self._scored if rows is None else rows
        logits = score_responses(self._model, self._tokenizer, chosen, probe)
        return smoothed_paths(logits, self._bundle.monitor)

    def scores(
        self, paths: Sequence[NDArray[np.float32]], prefix: int | None
    ) -> dict[str, NDArray[np.float64]]:
        """Score by every method, reading at most `prefix` tokens."""
        kept = None if prefix is None else prefix + 1
        found = {PROBE: maxima([path[:kept] for path in paths])}
        if not self._train:
            return found
        train = truncated(self._tokenizer, self._train, self._train_encoded, prefix)
        scored = truncated(self._tokenizer, self._scored, self.encoded, prefix)
        for name, control in _TEXT_CONTROLS.items():
            found[name] = control_scores(control, train, scored)
        found["mean token embedding"] = mean_embedding_scores(
            self._model, self._train_encoded, self._labels, self.encoded, tokens=prefix
        )
        if self._with_model:
            found |= self._model_controls(prefix)
        if self._train_paths is None:
            self._train_paths = self.paths(self._train)
        own = maxima([path[:kept] for path in self._train_paths])
        found["TF-IDF + probe, stacked"] = stacked_scores(
            out_of_fold_scores("tfidf_prompt_response", train),
            own,
            self._labels,
            found["TF-IDF of prompt + response"],
            found[PROBE],
        )
        return found

    def _model_controls(self, prefix: int | None) -> dict[str, NDArray[np.float64]]:
        seed = self._seed
        train, scored = self._harvested("own", prefix)
        random_train, random_scored = self._harvested("random", prefix)
        blind, dealt = shuffled(train, self._labels, seed=seed)
        return {
            "probe of the prompt": prompt_probe_scores(train, self._labels, scored),
            "probe on random weights": self._refitted(random_train, self._labels, random_scored),
            "probe of shuffled labels": self._refitted(blind, dealt, scored),
        }

    def _refitted(
        self, train: ResponseFeatures, labels: Sequence[bool], scored: ResponseFeatures
    ) -> NDArray[np.float64]:
        monitor = self._bundle.monitor
        return refitted_scores(train, labels, scored, fit=self._fit, monitor=monitor)

    def _harvested(
        self, which: str, prefix: int | None
    ) -> tuple[ResponseFeatures, ResponseFeatures]:
        if which not in self._features:
            model = self._model
            if which == "random":
                model = random_weight_copy(model, seed=self._seed)
            sites = self._bundle.probe.sites
            self._features[which] = (
                harvest(model, self._tokenizer, self._train, sites, storage="float16"),
                harvest(model, self._tokenizer, self._scored, sites, storage="float16"),
            )
        train, scored = self._features[which]
        return prefix_features(train, prefix), prefix_features(scored, prefix)


def truncated(
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    encoded: Sequence[EncodedResponse],
    prefix: int | None,
) -> list[Conversation]:
    """Cut responses to the text of their first tokens; None keeps them whole."""
    if prefix is None:
        return list(rows)
    return [
        replace(
            row,
            response=tokenizer.decode(
                list(ids.ids[ids.turn_start :][:prefix]), clean_up_tokenization_spaces=False
            ),
            response_ids=None,
            prefill_tokens=0,
            onset_char=None,
        )
        for row, ids in zip(rows, encoded, strict=True)
    ]
