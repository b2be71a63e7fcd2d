"""Random sets match what they are compared with, and chance has an overlap too."""

import numpy as np
import pytest

from probes.location.random_sets import chance_iou, iou, matched_draws, top_units
from probes.location.units import Ratios, assign
from safe_decode.errors import ConfigurationError
from tests.probes.reports.test_unit_plots import located


def numbers(units):
    pairs = np.stack([units.layer, units.kind], axis=1)
    return {tuple(map(int, p)): int((pairs == p).all(1).sum()) for p in np.unique(pairs, axis=0)}


@pytest.mark.parametrize("match", ["layer", "importance"])
def test_random_sets_have_the_layers_and_kinds_of_the_located_one(match):
    units = located(layers=4, heads=4, neurons=60)
    target = units.only("SCU")
    draws = matched_draws(units, match=match, count=5, seed=1)
    assert [numbers(draw) for draw in draws] == [numbers(target)] * 5
    # Neurons are many, so none of the located ones is drawn.
    assert all(iou(d.take(np.flatnonzero(d.kind == 1)), target) == 0 for d in draws)
    assert iou(draws[0], draws[1]) < 1


def test_importance_matched_sets_are_as_important():
    units = located(layers=2, heads=2, neurons=400)
    target = units.only("SCU")

    def ranks(part):
        total = units.i_s + units.i_u
        own = part.i_s + part.i_u
        return np.mean([(total <= value).mean() for value in own])

    by_layer = np.mean([ranks(d) for d in matched_draws(units, count=9, seed=0)])
    draws = matched_draws(units, match="importance", count=9, seed=0)
    matched = np.mean([ranks(d) for d in draws])
    assert abs(matched - ranks(target)) < 0.05 < abs(by_layer - ranks(target))


def test_where_others_run_out_the_size_is_kept():
    units = located(layers=1, heads=2, neurons=4)
    everything = assign(units, Ratios(redundant=0, safety=1, utility=0))
    (draw,) = matched_draws(everything, count=1, seed=0)
    assert len(draw) == 6
    assert iou(draw, everything) == 1


def test_chance_overlap_is_near_its_expectation():
    units = located(layers=1, heads=1, neurons=200)
    first = units.take(np.arange(1, 101))
    second = units.take(np.arange(51, 151))
    chance = chance_iou(first, second, units)
    assert chance.mean == pytest.approx(50 / 150, abs=0.02)
    assert iou(first, second) == pytest.approx(50 / 150)
    assert chance.mean < chance.high < 0.45


def test_top_units_are_the_largest():
    units = located()
    top = top_units(units, 5)
    assert sorted(top.i_s.tolist()) == sorted(units.i_s.tolist())[-5:]
    useful = top_units(units, 3, by="utility")
    excess = (units.i_u.astype(float) - units.i_s).tolist()
    assert sorted((useful.i_u.astype(float) - useful.i_s).tolist()) == sorted(excess)[-3:]


def test_an_unknown_match_is_refused():
    with pytest.raises(ConfigurationError, match="match='size'"):
        matched_draws(located(), match="size", count=1, seed=0)
