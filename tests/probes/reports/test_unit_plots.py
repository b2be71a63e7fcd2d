"""Located units as counts and as pictures that can be read back."""

import numpy as np
import pytest
from matplotlib.image import imread

from probes.location.units import CATEGORIES, Ratios, UnitScores, assign
from probes.reports.figures import require_plots
from probes.reports.unit_plots import category_counts, draw_importance, draw_shares
from safe_decode.errors import ConfigurationError


def located(layers=3, heads=2, neurons=20):
    counts = [count for _ in range(layers) for count in (heads, neurons)]
    rng = np.random.default_rng(0)
    scores = UnitScores(
        layer=np.repeat(np.arange(layers), heads + neurons).astype(np.int32),
        kind=np.repeat([0, 1] * layers, counts).astype(np.uint8),
        index=np.concatenate([np.arange(count) for count in counts]).astype(np.int32),
        i_s=rng.standard_cauchy(sum(counts)).astype(np.float32),
        i_u=rng.standard_cauchy(sum(counts)).astype(np.float32),
        head_dim=4,
    )
    return assign(scores, Ratios(safety=0.1))


def test_every_unit_is_counted_once():
    units = located()
    counts = category_counts(units)
    assert counts.shape == (3, 2, 4)
    assert counts.sum(axis=2).tolist() == [[2, 20]] * 3
    assert dict(zip(CATEGORIES, counts.sum(axis=(0, 1)).tolist(), strict=True)) == units.counts()
    critical = units.only("SCU")
    for layer in range(3):
        for kind in (0, 1):
            here = int(((critical.layer == layer) & (critical.kind == kind)).sum())
            assert counts[layer, kind, CATEGORIES.index("SCU")] == here
    assert category_counts(units.only()).shape == (0, 2, 4)


@pytest.mark.parametrize("draw", [draw_shares, draw_importance])
def test_a_picture_is_written_and_shows_something(draw, tmp_path):
    draw(located(), tmp_path / "plot.png")
    picture = imread(tmp_path / "plot.png")
    assert min(picture.shape[:2]) > 200
    assert len(np.unique(picture[..., 0])) > 10


def test_a_model_without_one_category_or_kind_is_drawn(tmp_path):
    units = located()
    draw_shares(units.only("SCU", "CU"), tmp_path / "a.png")
    neurons = units.take(np.flatnonzero(units.kind == 1))
    draw_shares(neurons, tmp_path / "b.png")
    draw_importance(neurons, tmp_path / "c.png")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_missing_matplotlib_and_a_missing_place_are_told(monkeypatch, tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be written"):
        draw_shares(located(), tmp_path / "none" / "plot.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'safe-decode\[plots\]'"):
        require_plots()
    with pytest.raises(ConfigurationError, match="plots need matplotlib"):
        draw_importance(located(), tmp_path / "plot.png")
