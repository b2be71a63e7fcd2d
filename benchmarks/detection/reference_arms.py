"""A linear probe and TF-IDF on the same first tokens of responses, fitted alike.

Both get an offset for each source while they are fitted, which is dropped for scoring, and
the same weights; sites and penalties are chosen by groups left out.

Knows a model, rows and two kinds of features. Does not know which rows are held out for what.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from benchmarks.detection.paired import SourcedRows, source_auroc, two_class_sources
from probes.activations.teacher_forcing import encode_response, teacher_forced
from probes.data.conversations import Conversation
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site, SiteKind
from safe_decode.errors import DataError
from safe_decode.loading import Loaded

__all__ = ["PREFIXES", "Arms", "TrainedChoices", "chosen_on_train", "pooled_features", "scored"]

LOG = logging.getLogger("benchmarks.detection.reference")
PREFIXES = (32, 64, 128)
_SETS: Mapping[str, tuple[SiteKind, ...]] = {
    "resid": ("resid",),
    "mlp": ("mlp",),
    "resid+attn": ("resid", "attn"),
}
_PROBE_C = (1e-4, 1e-3, 1e-2)
_TFIDF_C = (1.0, 10.0, 100.0)
_CHOSEN_AT = 64  # the prefix at which sites and penalties are chosen
_OFFSET = 10.0  # a source's column is large, so that its weight is hardly penalised


@dataclass(frozen=True)
class Arms:
    """Scores of the three arms on the rows of dev at one prefix, [n] each."""

    probe: NDArray[np.float64]
    tfidf_response: NDArray[np.float64]
    tfidf_prompt_response: NDArray[np.float64]


def pooled_features(
    loaded: Loaded, rows: Sequence[Conversation], *, tokens_per_batch: int
) -> dict[str, dict[int, NDArray[np.float32]]]:
    """Average the activations over the scores that judge the first tokens of each response.

    Returns:
        By kind of site and prefix, [n, F]: every layer and channel. s_0, which judges nothing
        of the response, is left out where there is a token.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    anatomy = anatomy_of(model)
    encoded = []
    for row in rows:
        whole = encode_response(tokenizer, row)
        encoded.append(whole._replace(ids=whole.ids[: whole.turn_start + max(PREFIXES)]))
    found: dict[str, dict[int, NDArray[np.float32]]] = {}
    kinds: tuple[SiteKind, ...] = ("resid", "attn", "mlp")
    sites = [
        Site(layer, kind, tuple(range(anatomy.width(layer, kind))))
        for layer in range(len(anatomy.blocks))
        for kind in kinds
    ]
    ordered = sorted(sites)
    of_kind = {
        kind: np.concatenate([np.full(len(s.channels), s.kind == kind) for s in ordered])
        for kind in kinds
    }
    for kind in kinds:
        width = int(of_kind[kind].sum())
        found[kind] = {k: np.empty((len(rows), width), np.float32) for k in PREFIXES}
    batches = teacher_forced(
        model, ordered, encoded, description="reading", tokens_per_batch=tokens_per_batch
    )
    for batch in batches:
        for index, place in enumerate(batch.rows):
            values = batch.of(index).cpu().numpy()
            spoken = values[1:] if len(values) > 1 else values
            for prefix in PREFIXES:
                mean = spoken[:prefix].mean(axis=0)
                for kind in kinds:
                    found[kind][prefix][place] = mean[of_kind[kind]]
    return found


def prefix_texts(loaded: Loaded, rows: Sequence[Conversation], prefix: int) -> list[str]:
    """Spell the first tokens of each response: what the probe has seen of it."""
    texts = []
    for row in rows:
        whole = encode_response(loaded.tokenizer, row)
        ids = list(whole.ids[whole.turn_start : whole.turn_start + prefix])
        texts.append(loaded.tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def with_prompt(rows: Sequence[Conversation], texts: Sequence[str]) -> list[str]:
    """Put the prompt's words before the response's, marked, so that the two differ."""
    return [
        " ".join(f"p_{word}" for word in row.prompt.split()) + "\n" + text
        for row, text in zip(rows, texts, strict=True)
    ]


_Features: TypeAlias = "NDArray[np.float32] | csr_matrix"


class _Linear:
    """Logistic regression with an offset for each source, which is dropped for scoring."""

    def __init__(self, c: float, max_iter: int = 300) -> None:
        self._model = LogisticRegression(C=c, max_iter=max_iter, tol=1e-3)

    def fit(self, features: _Features, rows: SourcedRows, at: NDArray[np.intp]) -> _Linear:
        names = np.unique(rows.sources)
        offsets = _OFFSET * (rows.sources[at][:, None] == names[None]).astype(np.float32)
        is_dense = isinstance(features, np.ndarray)
        inputs = (
            np.hstack([features, offsets])
            if is_dense
            else hstack([features, csr_matrix(offsets)]).tocsr()
        )
        self._model.fit(inputs, rows.harmful[at], sample_weight=_weights(rows, at))
        self.weight = self._model.coef_[0][: features.shape[1]]
        return self

    def score(self, features: _Features) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = np.asarray(features @ self.weight, np.float64).ravel()
        return scores


def _weights(rows: SourcedRows, at: NDArray[np.intp]) -> NDArray[np.float64]:
    """Let the two labels of a source weigh the same, each row about 1 on average."""
    weights = np.ones(len(at))
    sources, labels = rows.sources[at], rows.harmful[at]
    for source in np.unique(sources):
        for label in (False, True):
            cell = (sources == source) & (labels == label)
            other = (sources == source) & (labels != label)
            if cell.any() and other.any():
                weights[cell] = (cell.sum() + other.sum()) / (2 * cell.sum())
    return weights


def choose(
    candidates: Mapping[str, Any], penalties: Sequence[float], rows: SourcedRows, *, folds: int
) -> tuple[str, float, float]:
    """Choose features and penalty by groups of train left out; return them and the figure."""
    sources = two_class_sources(rows)
    best: tuple[str, float, float] | None = None
    for name, features in candidates.items():
        for c in penalties:
            scores = np.zeros(len(rows.rows))
            figures = []
            for fitted_on, held in GroupKFold(folds).split(scores, rows.harmful, rows.groups):
                one = _Linear(c).fit(features[fitted_on], rows, fitted_on)
                scores[held] = one.score(features[held])
                figures += [
                    source_auroc(scores, rows, held[rows.sources[held] == name]) for name in sources
                ]
            figure = float(np.nanmean(figures))
            LOG.info("train, left out: %s C=%g: %.4f", name, c, figure)
            if best is None or figure > best[2]:
                best = (name, c, figure)
    if best is None:
        raise DataError("nothing to choose from; pass at least one set of features.")
    return best


class _Standard(NamedTuple):
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> _Standard:
        std = values.std(axis=0)
        floor = max(1e-4 * float(np.median(std)), 1e-7)
        return cls(values.mean(axis=0), np.where(std <= floor, np.inf, std))

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return (values - self.mean) / self.std


def _joined(
    pooled: Mapping[str, Mapping[int, NDArray[np.float32]]], name: str, prefix: int
) -> NDArray[np.float32]:
    return np.hstack([pooled[kind][prefix] for kind in _SETS[name]])


def _words() -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, max_features=100_000)


class TrainedChoices(NamedTuple):
    """What train alone decided: the probe's sites and C, and C of the two controls."""

    sites: str
    c: float
    c_response: float
    c_prompt_response: float


def chosen_on_train(
    loaded: Loaded,
    train: SourcedRows,
    pooled: Mapping[str, Mapping[int, NDArray[np.float32]]],
    folds: int,
) -> TrainedChoices:
    """Choose at one prefix, groups left out."""
    candidates = {}
    for name in _SETS:
        values = _joined(pooled, name, _CHOSEN_AT)
        candidates[name] = _Standard.of(values)(values)
    sites, c, _ = choose(candidates, _PROBE_C, train, folds=folds)
    texts = prefix_texts(loaded, train.rows, _CHOSEN_AT)
    # The vocabulary is that of all of train: no label goes into it.
    own = _words().fit_transform(texts).tocsr()
    both = _words().fit_transform(with_prompt(train.rows, texts)).tocsr()
    _, c_own, _ = choose({"tfidf response": own}, _TFIDF_C, train, folds=folds)
    _, c_both, _ = choose({"tfidf prompt+response": both}, _TFIDF_C, train, folds=folds)
    return TrainedChoices(sites, c, c_own, c_both)


def scored(
    loaded: Loaded,
    train: SourcedRows,
    dev: SourcedRows,
    pooled_train: Mapping[str, Mapping[int, NDArray[np.float32]]],
    pooled_dev: Mapping[str, Mapping[int, NDArray[np.float32]]],
    chosen: TrainedChoices,
    prefix: int,
) -> Arms:
    """Fit each arm on all of train at one prefix and score dev."""
    every = np.arange(len(train.rows))
    values = _joined(pooled_train, chosen.sites, prefix)
    standard = _Standard.of(values)
    probe = _Linear(chosen.c).fit(standard(values), train, every)
    found = [probe.score(standard(_joined(pooled_dev, chosen.sites, prefix)))]
    texts = prefix_texts(loaded, train.rows, prefix)
    dev_texts = prefix_texts(loaded, dev.rows, prefix)
    for own, theirs, c in (
        (texts, dev_texts, chosen.c_response),
        (
            with_prompt(train.rows, texts),
            with_prompt(dev.rows, dev_texts),
            chosen.c_prompt_response,
        ),
    ):
        words = _words()
        fitted = _Linear(c).fit(words.fit_transform(own).tocsr(), train, every)
        found.append(fitted.score(words.transform(theirs).tocsr()))
    return Arms(*found)
