"""Selection: monitors in benign units, recall at a rate every population keeps, hold-back."""

import math

import numpy as np
import pytest
import torch

from probes.calibration.statistic import maxima, smoothed_paths
from probes.fitting.selection import SelectSet, choose_holdback, monitor_for, score_monitor
from probes.fitting.statistics import StatisticChoice
from safe_decode.errors import DataError


def streams(n=300, strength=3.0, seed=0):
    """Logit streams; the odd ones turn harmful at token 10 of 30."""
    rng = np.random.default_rng(seed)
    logits, harmful, onsets = [], [], []
    for row in range(n):
        values = rng.normal(-2, 1, size=(31, 1))
        if row % 2:
            values[11:] += strength
        logits.append(torch.tensor(values, dtype=torch.float32))
        harmful.append(bool(row % 2))
        onsets.append(10 if row % 2 else None)
    return logits, tuple(harmful), tuple(onsets)


def score(logits, labels, smoothing, fpr=0.01):
    return score_monitor(
        logits,
        labels,
        smoothing=smoothing,
        start=(-2.0,),
        fpr=fpr,
        holdback_share=0.9,
        most_holdback_tokens=16,
    )


def test_the_statistic_is_in_benign_standard_deviations():
    logits, harmful, onsets = streams()
    labels = SelectSet(harmful, onsets, ("benign",) * 300)
    config = monitor_for(logits, labels.benign_rows, smoothing=0.4, start=(-2.0,))
    peaks = maxima(smoothed_paths([logits[row] for row in labels.benign_rows], config))
    assert peaks.mean() == pytest.approx(0, abs=1e-4)
    assert peaks.std() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (StatisticChoice("ema", 4), "ema-4"),
        (StatisticChoice("mean", 8), "mean-8"),
        (StatisticChoice("cusum", drift=0.5), "cusum-0.5"),
        (StatisticChoice("ema", 2, hits=3), "ema-2x3"),
    ],
)
def test_every_statistic_finds_harm_at_the_rate_that_was_asked_for(choice, name):
    logits, harmful, onsets = streams(strength=2.5)
    labels = SelectSet(harmful, onsets, ("benign",) * 300)
    found = score_monitor(
        logits,
        labels,
        choice=choice,
        start=(-2.0,),
        fpr=0.02,
        holdback_share=0.9,
        most_holdback_tokens=16,
    )
    assert str(choice) == name
    assert found.monitor.kind == choice.kind
    assert found.monitor.hits == choice.hits
    peaks = maxima(smoothed_paths(logits, found.monitor))[~np.asarray(harmful)]
    assert (peaks > found.threshold).mean() <= 0.02
    assert found.tpr > 0.9


def test_heads_of_different_scale_become_comparable():
    logits, harmful, onsets = streams()
    two = [torch.cat([row, 100 * torch.randn(len(row), 1)], dim=1) for row in logits]
    labels = SelectSet(harmful, onsets, ("benign",) * 300)
    config = monitor_for(two, labels.benign_rows, smoothing=1.0, start=(-2.0, 0.0))
    assert config.scale[1] > 20 * config.scale[0]
    for head in (0, 1):
        peaks = np.array([float(two[row][:, head].max()) for row in labels.benign_rows])
        normed = (peaks - config.offset[head]) / config.scale[head]
        assert normed.std() == pytest.approx(1, abs=1e-3)


def test_smoothing_finds_weak_harm_that_single_scores_miss():
    logits, harmful, onsets = streams(strength=1.5)
    labels = SelectSet(harmful, onsets, ("benign",) * 300)
    raw, smooth = score(logits, labels, 1.0), score(logits, labels, 2 / 9)
    assert smooth.tpr > raw.tpr + 0.3
    assert smooth.rank() > raw.rank()


def test_the_rate_holds_in_every_population():
    logits, harmful, onsets = streams(n=400)
    refused = [row for row in range(400) if not harmful[row]][:100]
    for row in refused:
        logits[row] = logits[row] + 8  # refusals that look worse than harm
    names = tuple("harmful_refused" if row in refused else "benign" for row in range(400))
    pooled = SelectSet(harmful, onsets, ("benign",) * 400)
    apart = score(logits, SelectSet(harmful, onsets, names), 0.4, fpr=0.5)
    assert apart.tpr < score(logits, pooled, 0.4, fpr=0.5).tpr


def test_nothing_counts_as_clear_between_an_onset_and_a_late_trip():
    rng = np.random.default_rng(3)
    logits = [
        torch.tensor(rng.normal(-2, 1, size=(31, 1)), dtype=torch.float32) for _ in range(300)
    ]
    for row in range(1, 300, 2):  # harmful from token 10 on, and seen where the sentence ends
        logits[row][16] = 12.0
    labels = SelectSet(
        (False, True) * 150, tuple(10 if row % 2 else None for row in range(300)), ("benign",) * 300
    )
    chosen = score(logits, labels, 1.0)
    paths = smoothed_paths([logits[row] for row in range(1, 300, 2)], chosen.monitor)
    clear = [bool((path[11:16] < chosen.monitor.low_mark).any()) for path in paths]
    assert np.mean(clear) <= 0.1
    benign = monitor_for(logits, labels.benign_rows, smoothing=1.0, start=(-2.0,))
    assert np.mean([bool((path[11:16] < benign.low_mark).any()) for path in paths]) > 0.9


def test_the_low_mark_is_never_above_the_threshold():
    logits, harmful, onsets = streams()
    labels = SelectSet(harmful, onsets, ("benign",) * 300)
    for fpr in (0.01, 0.99):
        chosen = score(logits, labels, 1.0, fpr)
        assert chosen.monitor.low_mark <= chosen.threshold


def test_holdback_is_the_smallest_that_keeps_the_share_clean():
    paths = [np.zeros(20, np.float32) for _ in range(10)]
    for row, path in enumerate(paths):
        path[5 + row] = 9  # onset token 4 is judged by score 5: delays 0 .. 9
    onsets = [4] * 10
    found = [
        choose_holdback(paths, onsets, threshold=1.0, share=share, most=16)
        for share in (0.1, 0.5, 0.9, 1.0)
    ]
    assert found == [0, 4, 8, 9]
    assert choose_holdback(paths, onsets, threshold=1.0, share=1.0, most=6) == 6
    assert choose_holdback(paths, onsets, threshold=99.0, share=0.5, most=6) == 6
    assert choose_holdback(paths, [15] * 10, threshold=1.0, share=0.9, most=6) == 0


def test_without_known_onsets_the_delay_is_unknown_and_the_holdback_the_largest():
    logits, harmful, _ = streams()
    chosen = score(logits, SelectSet(harmful, (None,) * 300, ("benign",) * 300), 0.4)
    assert math.isnan(chosen.delay_p90)
    assert chosen.holdback_tokens == 16
    assert chosen.to_json()["delay_p90"] is None


def test_one_label_cannot_be_selected_on():
    with pytest.raises(DataError, match="only one label"):
        SelectSet((False, False), (None, None), ("benign", "benign"))
