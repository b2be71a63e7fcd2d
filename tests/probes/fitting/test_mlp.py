"""The MLP fitter finds what no line can, stops by itself and gives the same probe each time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from probes.activations.features import ResponseFeatures
from probes.fitting.interface import mean_logit
from probes.fitting.linear import FitConfig, LinearProbeFitter
from probes.fitting.mlp import MLPFitConfig, MLPProbeFitter, _held_out
from probes.fitting.multi_head import fit_heads, stacked
from probes.fitting.registry import settings_from, settings_record
from probes.fitting.search import fits_of
from safe_decode.activations.site import Site
from safe_decode.errors import ConfigurationError, DataError
from tests.probes.fitting.test_linear import SITES, planted

CONFIG = MLPFitConfig(hidden=16, learning_rate=0.01, max_passes=40)


def crossed(n=200, seed=0):
    """Harm is where two features have different signs: no line separates it."""
    rng = np.random.default_rng(seed)
    responses, harmful = [], []
    for row in range(n):
        values = rng.normal(size=(8, 4))
        signs = np.array([1.0, -1.0 if row % 2 else 1.0]) * rng.choice([-1.0, 1.0])
        values[:, :2] = signs * (1 + np.abs(values[:, :2]))
        responses.append(values.astype(np.float32))
        harmful.append(bool(row % 2))
    sites = (Site(0, "resid", (0, 1, 2, 3)),)
    return ResponseFeatures(sites, tuple(responses), (None,) * n), harmful


def auroc(probe, features, harmful):
    return roc_auc_score(harmful, [mean_logit(probe, [one])[0] for one in features.responses])


def test_it_finds_harm_that_no_line_separates():
    (features, harmful), (fresh, labels) = crossed(), crossed(seed=1)
    fitted = MLPProbeFitter(CONFIG).fit(features, harmful)
    linear = LinearProbeFitter(FitConfig()).fit(features, harmful)
    assert auroc(fitted.probe, fresh, labels) > 0.98
    assert auroc(linear.probe, fresh, labels) < 0.7


def test_it_finds_a_planted_direction_of_features_of_any_size():
    features, harmful, _ = planted(strength=3.0)
    fitted = MLPProbeFitter(CONFIG).fit(features, harmful)
    fresh, labels, _ = planted(seed=1, strength=3.0)
    assert auroc(fitted.probe, fresh, labels) > 0.95
    assert fitted.probe.heads == ("harm",) and fitted.probe.hidden_weight.shape == (12, 16)
    assert fitted.benign_mean[0] < 0


def test_the_same_seed_yields_the_same_probe_and_leaves_the_global_generator_alone():
    features, harmful = crossed(n=60)
    before = torch.random.get_rng_state()
    one, two = (MLPProbeFitter(CONFIG).fit(features, harmful).probe for _ in range(2))
    other = MLPProbeFitter(replace(CONFIG, seed=1)).fit(features, harmful).probe
    assert all(torch.equal(one.tensors()[name], two.tensors()[name]) for name in one.tensors())
    assert not torch.equal(one.hidden_weight, other.hidden_weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_fitting_stops_when_the_held_out_loss_no_longer_falls():
    features, harmful = crossed(n=60)
    noise = np.random.default_rng(0).permutation(harmful).tolist()
    stopped = MLPProbeFitter(replace(CONFIG, patience=2, max_passes=60)).fit(features, noise)
    cut = MLPProbeFitter(replace(CONFIG, max_passes=1)).fit(features, harmful)
    assert stopped.converged and not cut.converged


def test_groups_are_held_out_whole_and_of_each_label():
    groups = [f"g{row // 3}" for row in range(60)]
    harmful = [row // 3 % 2 == 0 for row in range(60)]
    held = _held_out(harmful, groups, CONFIG)
    assert {groups[row] for row in np.flatnonzero(held)}.isdisjoint(
        groups[row] for row in np.flatnonzero(~held)
    )
    assert held.sum() == 12 and len({harmful[row] for row in np.flatnonzero(held)}) == 2
    with pytest.raises(DataError, match="2 groups cannot be parted"):
        _held_out([True, False], ["a", "b"], CONFIG)
    with pytest.raises(ConfigurationError, match="1 groups for 2 responses"):
        _held_out([True, False], ["a"], CONFIG)


def test_dead_features_are_counted_and_read_with_zero_weight():
    features, harmful, _ = planted()
    for values in features.responses:
        values[:, 3] = 7.0
    fitted = MLPProbeFitter(CONFIG).fit(features, harmful)
    assert fitted.dead_features == 1
    assert not bool(fitted.probe.hidden_weight[3].any())


def test_heads_of_several_sites_are_joined_and_keep_their_logits():
    features, harmful, _ = planted()
    one = MLPProbeFitter(CONFIG).fit(features.at(SITES[:1]), harmful)
    two = MLPProbeFitter(replace(CONFIG, hidden=5)).fit(features, harmful)
    both = stacked({"a": one, "b": two})
    values = torch.from_numpy(features.responses[0])
    expected = torch.cat([one.probe(values[:, :3]), two.probe(values)], dim=1)
    torch.testing.assert_close(both.probe(values), expected, rtol=1e-4, atol=1e-4)
    assert both.benign_mean == (*one.benign_mean, *two.benign_mean)
    linear = LinearProbeFitter(FitConfig()).fit(features, harmful)
    with pytest.raises(ConfigurationError, match=r"the kinds \['linear', 'mlp'\]"):
        stacked({"a": one, "b": linear})


def test_each_category_gets_a_head():
    features, harmful, _ = planted()
    names = ["theft" if row % 4 == 0 else None for row in range(120)]
    groups = [f"g{row}" for row in range(120)]
    found = fit_heads(features, harmful, names, CONFIG, groups=groups, least=20)
    assert found.probe.heads == ("harm", "harm:theft") and found.probe.kind == "mlp"


def test_settings_are_checked_and_come_back_from_their_record():
    assert settings_from(settings_record(CONFIG)) == CONFIG
    assert CONFIG.label == "mlp H=16 decay=0.01" and not CONFIG.has_penalty
    with pytest.raises(ConfigurationError, match="hidden=0 must be above 0"):
        MLPFitConfig(hidden=0)
    with pytest.raises(ConfigurationError, match="held_out_share=1.5 must be below 1"):
        MLPFitConfig(held_out_share=1.5)
    with pytest.raises(ConfigurationError, match="method='token' is of linear probes"):
        fits_of(("token",), None, "mlp")
    with pytest.raises(ConfigurationError, match="c=0.5 is of linear probes"):
        fits_of(None, 0.5, "mlp")
