"""Candidates are compared on harm that comes late too: what remembers everything is blind there."""

import numpy as np
import torch

from probes.fitting.late_harm import late_recall
from probes.fitting.selection import SelectSet, score_monitor
from probes.fitting.statistics import StatisticChoice


def logits_of(n=200, length=300, seed=0):
    rng = np.random.default_rng(seed)
    harmful = np.arange(n) % 2 == 1
    rows = []
    for label in harmful:
        values = rng.normal(size=length if not label else 60)
        rows.append(torch.from_numpy(values + 1.2 * label)[:, None].float())
    return rows, harmful


def scored(choice, rows, harmful):
    labels = SelectSet(tuple(harmful.tolist()), (None,) * len(rows), ("benign",) * len(rows))
    return score_monitor(
        rows,
        labels,
        start=(0.0,),
        fpr=0.01,
        holdback_share=0.9,
        most_holdback_tokens=8,
        choice=choice,
    )


def test_a_mean_of_everything_finds_what_begins_at_once_and_not_what_comes_late():
    rows, harmful = logits_of()
    everything = scored(StatisticChoice("shrunk", 16), rows, harmful)
    recent = scored(StatisticChoice("ema", 16), rows, harmful)
    both = scored(StatisticChoice("bank", 16, memory=16), rows, harmful)
    assert everything.tpr > 0.95 and recent.tpr > 0.95
    assert everything.late_tpr < 0.2 < 0.95 < recent.late_tpr
    assert recent.rank() > everything.rank()
    assert min(both.tpr, both.late_tpr) > 0.95
    assert everything.recall == (everything.tpr + everything.late_tpr) / 2
    assert everything.to_json()["late_tpr"] == everything.late_tpr


def test_without_a_long_harmless_answer_nothing_is_late():
    rows, harmful = logits_of(length=60)
    found = scored(StatisticChoice("ema", 4), rows, harmful)
    assert found.late_tpr == found.tpr == found.recall
    monitor, limits = found.monitor, np.full(len(rows), found.threshold)
    assert late_recall(rows, harmful, (None,) * len(rows), monitor, limits) is None


def test_what_stands_before_an_onset_is_left_out():
    rows, harmful = logits_of()
    rows = [
        torch.cat([torch.full((30, 1), 50.0), row]) if bad else row
        for row, bad in zip(rows, harmful, strict=True)
    ]
    monitor = scored(StatisticChoice("ema", 16), *logits_of()).monitor
    onsets = tuple(29 if bad else None for bad in harmful)
    assert late_recall(rows, harmful, onsets, monitor, np.full(len(rows), 1e6)) == 0.0
    free = late_recall(rows, harmful, (None,) * len(rows), monitor, np.full(len(rows), 60.0))
    bound = late_recall(rows, harmful, onsets, monitor, np.full(len(rows), 60.0))
    assert free == 1.0 and bound == 0.0
