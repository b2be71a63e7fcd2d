"""What text alone gives away: the baselines every probe has to beat.

Knows words and lengths. Does not know activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from probes.data.conversations import Conversation
from probes.data.sources import source_of
from safe_decode.errors import DataError

__all__ = ["Control", "control_scores", "out_of_fold_scores"]

Control = Literal["tfidf_response", "tfidf_prompt_response", "tfidf_prompt", "length", "source"]
"""Logistic regression on TF-IDF of words and word pairs of the named text, on the length of the
response alone, or on nothing but where a row comes from."""

_MOST_WORDS = 50_000


def control_scores(
    control: Control,
    train: Sequence[Conversation],
    test: Sequence[Conversation],
    *,
    c: float = 10.0,
) -> NDArray[np.float64]:
    """Fit a control on `train` and score `test`, [n]: higher means more likely harmful.

    Raises:
        DataError: A conversation of `train` is not judged, or all are judged alike.
    """
    fitted = _pipeline(control, c).fit(_inputs(train, control), _labels(train))
    return _decision(fitted, _inputs(test, control))


def out_of_fold_scores(
    control: Control, train: Sequence[Conversation], *, c: float = 10.0, folds: int = 5
) -> NDArray[np.float64]:
    """Score `train` by fits that have not seen a row's group, [n]: what to stack on.

    Raises:
        DataError: As in `control_scores`, or fewer groups than two.
    """
    groups = [row.group for row in train]
    parts = min(folds, len(set(groups)))
    if parts < 2:
        raise DataError(f"train has {len(set(groups))} groups; stacking needs at least two.")
    inputs = _inputs(train, control)
    scores: NDArray[np.float64] = cross_val_predict(
        _pipeline(control, c),
        inputs,
        np.asarray(_labels(train)),
        groups=groups,
        cv=GroupKFold(parts),
        method="decision_function",
    )
    return scores


def _labels(train: Sequence[Conversation]) -> list[bool]:
    labels = [row.response_harmful for row in train]
    if None in labels or len(set(labels)) < 2:
        raise DataError("train must be judged, with harmful and harmless responses; drop others.")
    return [bool(label) for label in labels]


def _pipeline(control: Control, c: float) -> Pipeline:
    model = LogisticRegression(C=c, max_iter=1000)
    if control == "length":
        return make_pipeline(StandardScaler(), model)
    if control == "source":
        # A source that train has not seen says nothing.
        return make_pipeline(OneHotEncoder(handle_unknown="ignore"), model)
    # By default words of a single letter would be dropped.
    words = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        max_features=_MOST_WORDS,
        token_pattern=r"(?u)\b\w+\b",
    )
    return make_pipeline(words, model)


def _inputs(rows: Sequence[Conversation], control: Control) -> NDArray[Any]:
    if control == "length":
        return _lengths(rows)
    if control == "source":
        return np.asarray([[source_of(row)] for row in rows], dtype=object)
    return np.asarray([_text(row, control) for row in rows], dtype=object)


def _decision(model: Pipeline, inputs: object) -> NDArray[np.float64]:
    scores: NDArray[np.float64] = np.asarray(model.decision_function(inputs), dtype=np.float64)
    return scores


def _lengths(rows: Sequence[Conversation]) -> NDArray[np.float64]:
    counts = [[len(row.response), len(row.response.split())] for row in rows]
    return np.log1p(np.asarray(counts, dtype=np.float64))


def _text(row: Conversation, control: Control) -> str:
    prompt = "\n".join(message["content"] for message in row.messages)
    if control == "tfidf_prompt":
        return prompt
    # Marked, so that a word of the prompt and the same word of the response differ.
    response = row.response
    if control == "tfidf_prompt_response":
        return " ".join(f"p_{word}" for word in prompt.split()) + "\n" + response
    return response
