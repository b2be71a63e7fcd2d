"""A bag of words must not do the probe's work on cells that it has not seen."""

from __future__ import annotations

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from probes.organism.grammar import Cells, Grammar


def _exchange(grammar):
    """Draw a request, an answer, and whether the answer is harmful: attacks, turns, refusals."""
    draw = grammar.rng.random()
    if draw < 0.5:
        harmful = grammar.rng.random() < 0.5
        request = grammar.request("scene", harmful=harmful)
        answer = grammar.answer(request, "harmful" if harmful else "benign")
    elif draw < 0.7:
        kind = grammar.rng.choice(("topic", "open", "info", "fact", "scene"))
        request = grammar.request(kind)
        answer = grammar.rng.choice(grammar.twin(request))
    elif draw < 0.85:
        request = grammar.request(grammar.rng.choice(("topic", "open", "info", "fact")))
        answer = grammar.answer(request, "benign")
    else:
        request = grammar.request("scene", harmful=True)
        answer = grammar.answer(request, "refusal")
    shown = grammar.framed(request) if grammar.rng.random() < 0.3 else request
    return shown.text, answer.text, answer.meant == "harmful"


def _rows(cells, seed, count):
    grammar = Grammar(seed, cells)
    return [_exchange(grammar) for _ in range(count)]


@pytest.mark.parametrize("fold", [0, 1, 2])
@pytest.mark.parametrize("reads_request", [False, True])
def test_words_alone_stay_under_080_auroc_on_unseen_cells(fold, reads_request):
    def texts(rows):
        return [f"{asked} || {said}" if reads_request else said for asked, said, _ in rows]

    seen, unseen = _rows(Cells.seen(fold), 1, 2500), _rows(Cells.unseen(fold), 2, 1500)
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(max_iter=400, C=10),
    )
    model.fit(texts(seen), [harmful for *_, harmful in seen])
    truth = [harmful for *_, harmful in unseen]
    assert roc_auc_score(truth, model.decision_function(texts(unseen))) <= 0.80
