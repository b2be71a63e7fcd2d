"""Units: the order of assignment, the ratios, the sites and the file."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from probes.location.units import CATEGORIES, Ratios, UnitScores, UnitSet, assign, sites_of
from safe_decode.activations.site import Site, n_features
from safe_decode.errors import ConfigurationError, DataError


def scores(i_s, i_u, kind=None, head_dim=4):
    n = len(i_s)
    return UnitScores(
        layer=np.arange(n, dtype=np.int32) // 5,
        kind=np.asarray([1] * n if kind is None else kind, dtype=np.uint8),
        index=np.arange(n, dtype=np.int32) % 5,
        i_s=np.asarray(i_s, dtype=np.float32),
        i_u=np.asarray(i_u, dtype=np.float32),
        head_dim=head_dim,
    )


def oracle(i_s, i_u, ratios):
    """The paper's order, one unit at a time."""
    names, n = ["CU"] * len(i_s), len(i_s)
    rest = list(range(n))
    steps = (
        ("RU", ratios.redundant, lambda u: i_u[u] + i_s[u]),
        ("SCU", ratios.safety, lambda u: i_u[u] - i_s[u]),
        ("UCU", ratios.utility, lambda u: i_s[u] - i_u[u]),
    )
    for name, ratio, key in steps:
        for _ in range(round(ratio * n)):
            best = min(rest, key=key)
            names[best] = name
            rest.remove(best)
    return names


def test_categories_follow_the_papers_order():
    rng = np.random.default_rng(0)
    for seed in range(5):
        i_s, i_u = rng.normal(size=(2, 60)).astype(np.float32)
        ratios = Ratios(redundant=0.2, safety=0.05 * (seed + 1), utility=0.15)
        units = assign(scores(i_s, i_u), ratios)
        found = [CATEGORIES[c] for c in units.category]
        assert found == oracle(i_s.astype(float), i_u.astype(float), ratios)
        assert units.counts() == {name: found.count(name) for name in CATEGORIES}


def test_redundant_units_are_taken_before_safety_critical_ones():
    # The unit of largest I_S - I_U is also the one of smallest sum: it must be redundant.
    units = assign(scores([0, 1, 2, 3], [-9, 1, 2, 3]), Ratios(redundant=0.25, safety=0.25))
    assert CATEGORIES[units.category[0]] == "RU"


def test_separate_ranking_applies_the_ratios_within_each_kind():
    kind = [0] * 10 + [1] * 10
    i_s = list(range(20))
    ratios = Ratios(redundant=0, safety=0.2, utility=0)
    joint = assign(scores(i_s, [0] * 20, kind), ratios)
    apart = assign(scores(i_s, [0] * 20, kind), ratios, ranking="separate")
    assert [int((joint.only("SCU").kind == k).sum()) for k in (0, 1)] == [0, 4]
    assert [int((apart.only("SCU").kind == k).sum()) for k in (0, 1)] == [2, 2]


def test_a_head_is_read_at_all_of_its_channels():
    units = assign(
        scores([9, 0, 0, 0, 0, 8, 7, 0, 0, 0], [0] * 10, [0] + [1] * 9),
        Ratios(redundant=0, safety=0.3, utility=0),
    )
    sites = sites_of(units.only("SCU"))
    assert sites == (Site(0, "attn", (0, 1, 2, 3)), Site(1, "mlp", (0, 1)))


def test_most_critical_fills_the_budget_with_whole_units_and_skips_redundant_ones():
    i_s, i_u = [0, 5, 4, 3, -9, 1], [0, 0, 0, 0, -99, 0]
    units = assign(scores(i_s, i_u, [1, 1, 0, 1, 1, 1]), Ratios(redundant=0.17, safety=0))
    assert CATEGORIES[units.category[4]] == "RU"
    assert n_features(sites_of(units.most_critical(3))) == 3
    assert units.most_critical(3).index.tolist() == [1, 3, 0]  # the head of 4 does not fit
    assert units.most_critical(5).index.tolist() == [1, 2]
    with pytest.raises(ConfigurationError, match="max_features=0 holds no unit"):
        units.most_critical(0)


def test_a_unit_set_returns_as_it_was_saved(tmp_path):
    rng = np.random.default_rng(1)
    units = assign(scores(*rng.normal(size=(2, 40))), Ratios(), provenance={"data": "own"})
    units.save(tmp_path / "units.safetensors")
    loaded = UnitSet.load(tmp_path / "units.safetensors")
    for name in ("layer", "kind", "index", "i_s", "i_u", "category"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(units, name))
    assert loaded.head_dim == 4
    assert loaded.provenance["data"] == "own"
    assert loaded.provenance["ratios"] == {"redundant": 0.13, "safety": 0.02, "utility": 0.13}
    assert [p.name for p in tmp_path.iterdir()] == ["units.safetensors"]


def test_a_truncated_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "units.safetensors"
    assign(scores([1, 2], [1, 2]), Ratios()).save(path)
    whole = path.read_bytes()
    arrays = load_file(path)
    path.write_bytes(whole[: len(whole) - 5])
    with pytest.raises(DataError, match="cannot be read as units"):
        UnitSet.load(path)
    save_file(arrays, path, {"format": "other", "provenance": json.dumps({})})
    with pytest.raises(DataError, match="has format 'other'"):
        UnitSet.load(path)


def test_ratios_above_the_whole_are_refused():
    with pytest.raises(ConfigurationError, match="add to at most 1"):
        Ratios(redundant=0.5, safety=0.5, utility=0.1)
