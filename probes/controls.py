"""What text alone gives away: the baselines every probe has to beat.

Knows words and lengths. Does not know activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from probes.conversations import Conversation
from safe_decode.errors import DataError

__all__ = ["Control", "control_scores"]

Control = Literal["tfidf_response", "tfidf_prompt_response", "tfidf_prompt", "length"]
"""Logistic regression on TF-IDF of words and word pairs of the named text, or on the
length of the response alone."""

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
    labels = [row.response_harmful for row in train]
    if None in labels or len(set(labels)) < 2:
        raise DataError("train must be judged, with harmful and harmless responses; drop others.")
    model = LogisticRegression(C=c, max_iter=1000)
    if control == "length":
        scaled = make_pipeline(StandardScaler(), model).fit(_lengths(train), labels)
        return _decision(scaled, _lengths(test))
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=_MOST_WORDS)
    fitted = make_pipeline(words, model).fit([_text(row, control) for row in train], labels)
    return _decision(fitted, [_text(row, control) for row in test])


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
