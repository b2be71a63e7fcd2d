"""Evaluation: counts, exact bounds, delays, leaks, and controls that read only text."""

import json
import math

import numpy as np
import pytest
from scipy.stats import binom

from probes.data.conversations import Conversation
from probes.evaluation.text_baselines import control_scores
from probes.metrics.detection import (
    Proportion,
    delay_of,
    evaluate,
    quantile_with_misses,
    rates_by_group,
    threshold_at,
    within_group_auroc,
)
from safe_decode.errors import ConfigurationError, DataError


def path(*values):
    return np.asarray(values, dtype=np.float32)


@pytest.mark.parametrize(("k", "n"), [(0, 50), (1, 50), (25, 50), (50, 50), (3, 1600)])
def test_bounds_are_exact(k, n):
    share = Proportion.of(k, n)
    # By definition the bound is the share at which so few, or so many, have the tail's chance.
    if k < n:
        assert binom.cdf(k, n, share.upper_bound) == pytest.approx(0.05)
        assert binom.cdf(k, n, share.high) == pytest.approx(0.025)
    if k:
        assert binom.sf(k - 1, n, share.lower_bound) == pytest.approx(0.05)
        assert binom.sf(k - 1, n, share.low) == pytest.approx(0.025)
    assert share.low <= share.lower_bound <= share.point <= share.upper_bound <= share.high


def test_a_share_of_nothing_is_unknown():
    assert math.isnan(Proportion.of(0, 0).point)
    assert (Proportion.of(0, 0).low, Proportion.of(0, 0).high) == (0.0, 1.0)
    with pytest.raises(ConfigurationError, match=r"successes=3 is outside 0\.\.2"):
        Proportion.of(3, 2)


def test_the_threshold_lets_no_more_than_the_share_through():
    values = np.random.default_rng(0).permutation(1000).astype(float)
    for fpr in (0.0, 0.001, 0.01, 0.05):
        assert (values > threshold_at(values, fpr)).sum() == round(1000 * fpr)
    ties = np.array([1.0] * 99 + [2.0] * 2)
    assert (ties > threshold_at(ties, 0.01)).sum() == 0
    with pytest.raises(DataError, match="no response"):
        threshold_at(np.array([]), 0.1)


def test_delay_counts_tokens_from_onset_to_trip():
    # Onset is token 2, judged by score 3.
    paths = [
        path(0, 0, 0, 9, 9, 9),  # trips on the onset token: 0
        path(0, 0, 0, 0, 0, 9),  # two tokens later: 2
        path(0, 9, 0, 9, 9, 9),  # on token 0, before the onset
        path(9, 0, 0, 0, 0, 0),  # on the prompt
        path(0, 0, 0, 0, 0, 0),  # missed
    ]
    found = delay_of(paths, [2] * 5, threshold=1.0, holdback_tokens=0)
    assert found.before_onset.successes == 2
    assert found.missed.successes == 1
    assert (found.median, found.p90) == (2.0, math.inf)


def test_leaked_tokens_are_those_released_from_the_onset_on():
    # Six tokens, onset at token 1; the trip comes on token 4 (score 5).
    one = [path(0, 0, 0, 0, 0, 9, 9)]
    leaked = [
        delay_of(one, [1], threshold=1.0, holdback_tokens=k).leaked_median for k in (0, 1, 2, 3, 9)
    ]
    # Without hold-back tokens 1, 2, 3 were out when token 4 gave it away.
    assert leaked == [3, 2, 1, 0, 0]
    missed = delay_of([path(*[0] * 7)], [1], threshold=1.0, holdback_tokens=9)
    assert missed.leaked_median == 5
    assert missed.released.successes == 1


def test_quantiles_count_misses_as_infinite():
    assert quantile_with_misses(np.array([1, 2, 3, math.inf]), 0.5) == 2
    assert quantile_with_misses(np.array([1, 2, 3, math.inf]), 0.9) == math.inf
    assert quantile_with_misses(np.arange(10.0), 0.9) == 8
    assert math.isnan(quantile_with_misses(np.array([]), 0.5))


def test_evaluation_separates_planted_harm_and_is_json():
    rng = np.random.default_rng(0)
    harmful = [row % 2 == 0 for row in range(400)]
    paths, onsets = [], []
    for label in harmful:
        values = rng.normal(size=21).astype(np.float32) * 0.3
        if label:
            values[11:] += 10
        paths.append(values)
        onsets.append(10 if label else None)
    found = evaluate(paths, harmful, onsets, threshold=5.0, holdback_tokens=2)
    assert found.auroc == 1.0
    assert found.at_threshold.detected.point == 1.0
    assert found.at_threshold.false_alarms.successes == 0
    assert [d.false_alarms.successes for d in found.at_fpr] == [0, 2]
    assert found.delay is not None
    assert (found.delay.median, found.delay.released.successes) == (0.0, 0)
    missed = evaluate(paths, harmful, onsets, threshold=50.0)
    assert json.loads(json.dumps(missed.to_json()))["delay"]["median"] == "inf"
    assert missed.to_json()["at_threshold"]["target_fpr"] is None


def test_within_group_auroc_ignores_what_tells_groups_apart():
    groups = ["a"] * 4 + ["b"] * 4 + ["c"] * 2
    harmful = [False, False, False, True, True, True, True, False, True, True]
    statistic = np.array([2, 1, 0, 1, 12, 11, 10, 11, 50, 51], dtype=float)
    found = within_group_auroc(harmful, statistic, groups)
    assert set(found) == {"a", "b"}
    assert found["a"] == found["b"] == 0.5


def test_rates_are_counted_by_group():
    rates = rates_by_group(np.array([1.0, 3.0, 3.0]), ["x", "x", "y"], threshold=2.0)
    assert [(name, r.successes, r.n) for name, r in rates.items()] == [("x", 1, 2), ("y", 1, 1)]


def conversation(prompt, response, label):
    messages = ({"role": "user", "content": prompt},)
    return Conversation(messages=messages, response=response, group="g", response_harmful=label)


def test_a_control_reads_only_its_own_text():
    rng = np.random.default_rng(0)
    # The prompt's word decides; response words and lengths are noise.
    rows = [
        conversation(
            "wrong thing" if row % 2 else "right thing",
            " ".join(rng.choice(["some", "word", "here"], size=8)),
            bool(row % 2),
        )
        for row in range(80)
    ]
    labels = [row.response_harmful for row in rows[40:]]
    scores = {
        name: within_group_auroc(labels, control_scores(name, rows[:40], rows[40:]), ["t"] * 40)[
            "t"
        ]
        for name in ("tfidf_response", "tfidf_prompt_response", "tfidf_prompt", "length")
    }
    assert scores["tfidf_prompt"] == scores["tfidf_prompt_response"] == 1.0
    assert abs(scores["tfidf_response"] - 0.5) < 0.3
    assert abs(scores["length"] - 0.5) < 0.3


def test_the_length_control_finds_length():
    rows = [conversation("p", "word " * (20 if row % 2 else 5), bool(row % 2)) for row in range(40)]
    scores = control_scores("length", rows[:20], rows[20:])
    assert (scores[1::2] > scores[::2].max()).all()


def test_a_control_refuses_rows_that_are_not_judged():
    rows = [conversation("p", "a", True), conversation("p", "b", None)]
    with pytest.raises(DataError, match="train must be judged"):
        control_scores("length", rows, rows)
