"""False alarms are spent evenly: the hazard of harmless responses is flat over blocks."""

import numpy as np
import torch

from probes.calibration.statistic import smoothed_paths
from probes.fitting.boundary import hazards, spent_evenly
from probes.fitting.selection import monitor_for
from probes.fitting.statistics import StatisticChoice
from safe_decode.certificate import certified_threshold


def responses(n, seed, *, drift=0.01):
    """Logits of harmless responses of 8 to 700 tokens, which spread more the longer they are."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        length = int(rng.choice([8, 60, 200, 700]))
        spread = 1.0 + drift * np.arange(length + 1)
        found.append(torch.from_numpy((rng.normal(size=length + 1) * spread)[:, None]).float())
    return found


def rates_of(choice):
    """Share of those at risk that alarm first in each block, at a threshold for a tenth of all."""
    select, fresh = responses(3000, 0), responses(3000, 1)
    monitor = monitor_for(select, np.arange(len(select)), start=(0.0,), choice=choice)
    maxima = [float(path.max()) for path in smoothed_paths(select, monitor)]
    counts = hazards(smoothed_paths(fresh, monitor), certified_threshold(maxima, 0.1, 0.05))
    return monitor, [alarms / at_risk for alarms, at_risk in counts]


def test_harmless_responses_that_were_not_looked_at_alarm_as_often_early_as_late():
    plain, before = rates_of(StatisticChoice("ema", 4))
    even, after = rates_of(StatisticChoice("ema", 4, even=True))
    assert not plain.boundary and even.boundary_at[-1] > 512
    assert before[0] == 0.0 and before[-1] > 0.2
    assert max(after) < 4 * sum(after) / len(after) and min(after) > 0.005
    shrunk, rates = rates_of(StatisticChoice("shrunk", 32, even=True))
    assert shrunk.boundary and max(rates) < 4 * min(rates)


def test_a_boundary_ends_where_responses_are_too_few():
    short = [np.zeros(20, np.float32)] * 60
    assert spent_evenly(short).at == (8, 18)
    assert spent_evenly(short[:49]) == ((), ())


def test_hazards_count_first_alarms_of_those_at_risk():
    quiet, early, late = (np.zeros(131, np.float32) for _ in range(3))
    early[3], early[100], late[130] = 2.0, 2.0, 2.0
    assert hazards([quiet, early, late], 1.0) == [(1, 3), (0, 2), (1, 2)]
    assert hazards([quiet, early, late], 1.0, block=65) == [(1, 3), (1, 2)]
    assert hazards([quiet[:1]], 1.0) == [(0, 1)]
