"""Evaluation of a bundle: the probe among its controls, and intervals by clusters."""

import json
import math

import numpy as np
import pytest
import torch

from probes.activations.teacher_forcing import encode_response
from probes.data.conversations import Conversation, by_split
from probes.data.sources import source_of
from probes.evaluation.methods import truncated
from probes.evaluation.model_baselines import random_weight_copy
from probes.evaluation.offline import EvaluationConfig, evaluate_bundle
from probes.evaluation.text_baselines import control_scores, out_of_fold_scores
from probes.fitting.linear import FitConfig
from probes.metrics.comparison import (
    PROBE,
    MethodScores,
    ScoredRows,
    compare,
    macro_auroc,
    pair_accuracies,
)
from probes.metrics.detection import delay_of
from probes.metrics.intervals import cluster_draws, holm, interval_of
from safe_decode.errors import DataError
from safe_decode.testing.models import tiny_model
from tests.planted import planted_bundle, planted_rows


@pytest.fixture(scope="module")
def report():
    from safe_decode.testing.models import byte_tokenizer

    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    parts = by_split(planted_rows(380))
    bundle = planted_bundle(model, tokenizer, parts)
    config = EvaluationConfig(
        prefixes=(None, 6), draws=40, fit=FitConfig(c=0.1, max_iterations=60), alpha=0.05
    )
    return evaluate_bundle(
        model,
        tokenizer,
        bundle,
        parts["test"],
        config,
        train=parts["fit"],
        calibrate=parts["calibrate"],
    )


def figures(report, name="all responses", prefix=None):
    found = next(s for s in report.slices if (s.name, s.prefix_tokens) == (name, prefix))
    return {one.method: one for one in found.figures}


def test_the_probe_stands_among_all_its_controls(report):
    assert set(figures(report)) == {
        PROBE,
        "source only",
        "length only",
        "TF-IDF of the prompt",
        "TF-IDF of the response",
        "TF-IDF of prompt + response",
        "mean token embedding",
        "probe of the prompt",
        "probe on random weights",
        "probe of shuffled labels",
        "TF-IDF + probe, stacked",
    }
    assert {(s.name, s.prefix_tokens) for s in report.slices} == {
        ("all responses", None),
        ("all responses", 6),
        ("within harmful requests", None),
        ("within harmful requests", 6),
    }


def test_planted_harm_is_seen_by_what_reads_it_and_by_nothing_else(report):
    found = figures(report)
    assert found[PROBE].auroc.point > 0.95
    assert found["mean token embedding"].auroc.point > 0.95
    # The prompt's letters give harmful requests away; the source does not within itself.
    assert found["source only"].auroc.point == 0.5
    assert abs(found["probe of shuffled labels"].auroc.point - 0.5) < 0.4
    within = figures(report, "within harmful requests")
    assert within["TF-IDF of the prompt"].auroc.point < 0.75
    assert within[PROBE].gain is None and within["length only"].gain is not None
    gain = within["TF-IDF of the prompt"].gain
    assert gain.low > 0 and gain.low <= gain.point <= gain.high
    assert within["TF-IDF of the prompt"].gain_p < 0.25


def test_before_the_harm_nothing_that_reads_the_response_knows(report):
    early = figures(report, "within harmful requests", 6)
    late = figures(report, "within harmful requests")
    assert early[PROBE].auroc.point < late[PROBE].auroc.point
    assert early["TF-IDF of the response"].auroc.point < 0.9


def test_thresholds_of_controls_are_calibrated_as_the_probes_was(report):
    found = figures(report)
    assert found[PROBE].at_calibrated.threshold == report.certificate.threshold
    for one in found.values():
        assert one.at_calibrated is not None
        assert one.at_calibrated.false_alarms.low <= 0.05
        assert one.at_calibrated.false_alarms.n == one.n_benign
        assert [d.target_fpr for d in one.at_fpr] == [0.001, 0.01]


def test_delay_categories_and_populations_are_named_and_json(report):
    assert report.delay is not None
    assert report.delay.within_32.point == pytest.approx(1 - report.delay.missed.point)
    shares = [share.point for share in report.recall_by_category.values()]
    assert shares == sorted(shares) and len(shares) == 2
    assert set(report.alarms_by_population) == {"benign", "hard"}
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["responses"] == len(report.test) == len(report.paths)
    assert found["delay"]["median"] is not None
    texts = {row.response for row in report.test}
    assert not any(text in json.dumps(found) for text in texts)


def test_without_training_rows_the_probe_stands_alone(llama, tokenizer):
    parts = by_split(planted_rows(330))
    bundle = planted_bundle(llama, tokenizer, parts)
    config = EvaluationConfig(prefixes=(None,), draws=5, fit=FitConfig(), alpha=0.05)
    found = evaluate_bundle(llama, tokenizer, bundle, parts["test"], config)
    assert [one.method for one in found.slices[0].figures] == [PROBE]
    benign = [row for row in parts["test"] if not row.response_harmful]
    with pytest.raises(DataError, match="0 of them harmful"):
        evaluate_bundle(llama, tokenizer, bundle, benign, config)


def test_resamples_take_whole_clusters():
    clusters = ["a"] * 3 + ["b"] * 2 + ["c"]
    seen = []

    def counted(rows):
        seen.append(rows)
        return np.asarray([float(len(rows))])

    drawn = cluster_draws(counted, clusters, draws=50)
    assert drawn.shape == (50, 1)
    for rows in seen:
        times = np.bincount(rows, minlength=6)
        assert len(set(times[:3])) == len(set(times[3:5])) == 1
        assert times[0] + times[3] + times[5] == 3
    with pytest.raises(DataError, match="no row"):
        cluster_draws(counted, [])


def test_an_interval_covers_and_leaves_out_what_is_undefined():
    draws = np.concatenate([np.linspace(0, 1, 999), [math.nan]])
    found = interval_of(0.5, draws)
    assert (found.low, found.high) == (pytest.approx(0.025), pytest.approx(0.975))
    assert found.p_above_0 == pytest.approx(2 / 1000)
    assert math.isnan(interval_of(math.nan, draws).low)


def test_holm_steps_down():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan})
    assert found["a"] == pytest.approx(0.03)
    assert found["b"] == found["c"] == pytest.approx(0.06)
    assert math.isnan(found["d"])
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_macro_auroc_is_that_of_scikit_learn_averaged_over_sources():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, size=(2, 60)).astype(float)
    harmful, sources = rng.random(60) < 0.4, np.asarray(list("abc") * 20)
    sources[harmful & (sources == "c")] = "b"
    expected = [
        np.mean([roc_auc_score(harmful[sources == s], row[sources == s]) for s in "ab"])
        for row in scores
    ]
    np.testing.assert_allclose(macro_auroc(scores, harmful, sources), expected)
    assert np.isnan(macro_auroc(scores, np.zeros(60, bool), sources)).all()


def test_pairs_are_compared_within_a_prompt_and_a_prompt_counts_once():
    rows = ScoredRows(
        np.asarray([True, False, True, False, False, True, False]),
        ("s",) * 7,
        ("a", "a", "b", "b", "b", "c", "d"),
    )
    scores = np.asarray([[1.0, 0.0, 1.0, 1.0, 2.0, 9.0, 0.0]])
    pairs = pair_accuracies(scores, rows)
    assert pairs.first_rows.tolist() == [0, 2]
    np.testing.assert_allclose(pairs.accuracy, [[1.0, 0.25]])
    np.testing.assert_allclose(pairs.mean(np.asarray([1, 3])), [(1 + 3 * 0.25) / 4])
    found = compare({PROBE: MethodScores(scores[0], None)}, rows, draws=10)
    assert (found[0].pairs, found[0].pair_accuracy.point) == (2, 0.625)
    assert found[0].at_calibrated is None


def row(prompt, response, label, **changes):
    messages = ({"role": "user", "content": prompt},)
    return Conversation(
        messages=messages,
        response=response,
        response_harmful=label,
        **{"group": prompt, **changes},
    )


def test_a_prefix_is_cut_by_tokens_and_the_source_is_named(tokenizer):
    one = row("p", "hello world", True, onset_char=6, meta={"situation": "turn"})
    (cut,) = truncated(tokenizer, [one], [encode_response(tokenizer, one)], 4)
    assert (cut.response, cut.onset_char) == ("hell", None)
    assert source_of(one) == "turn"
    assert source_of(row("p", "x", True, meta={"source": "set", "situation": "turn"})) == "set"
    assert source_of(row("p", "x", True)) == "all"


def test_the_source_alone_and_out_of_fold_scores():
    rows = [
        row(
            f"p{n}",
            f"word{n} {'bad' if n % 3 == 0 else 'good'}",
            n % 3 == 0,
            meta={"source": "x" if n % 3 == 0 else "y"},
        )
        for n in range(30)
    ]
    scores = control_scores("source", rows, [rows[0], rows[1], row("q", "z", True)])
    assert scores[0] > 0 > scores[1]
    folds = out_of_fold_scores("tfidf_response", rows)
    assert folds[::3].min() > max(folds[1::3].max(), folds[2::3].max())
    with pytest.raises(DataError, match="at least two"):
        out_of_fold_scores("length", [row("p", "a", True), row("p", "b", False)])


def test_random_weights_keep_their_spread_and_lose_their_order(llama):
    other = random_weight_copy(llama, seed=1)
    for (name, a), (_, b) in zip(llama.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a.flatten().sort().values, b.flatten().sort().values)
        assert (a.ndim < 2) == torch.equal(a, b), name


def test_delay_counts_those_within_reach():
    path = lambda *values: np.asarray(values, dtype=np.float32)  # noqa: E731
    paths = [path(*[0] * (2 + d), *[9] * 3) for d in (0, 32, 33, 128, 129)]
    found = delay_of([*paths, path(9, 0, 0)], [1] * 6, threshold=1.0, holdback_tokens=0)
    assert (found.within_32.successes, found.within_128.successes) == (3, 5)
