"""Importance: streaming moments equal the definition, and scores follow the variants."""

import numpy as np
import pytest
import torch

from probes.location.importance import ChannelMoments, RunningMoments, score_units
from safe_decode.errors import ConfigurationError, DataError, NonFiniteError


def moments(layer, kind, variance, norm):
    return ChannelMoments(layer, kind, np.asarray(variance, float), np.asarray(norm, float), 9)


def test_streamed_variance_equals_the_definition_however_it_is_cut():
    rng = np.random.default_rng(0)
    # A mean far above the spread: a sum-of-squares formula would lose it in float32.
    rows = (rng.normal(size=(5000, 7)) * 0.1 + 300).astype(np.float32)
    for cuts in ([], [1], [1, 2, 17, 4000], list(range(100, 5000, 100))):
        stream = RunningMoments(7)
        for part in np.split(rows, cuts):
            stream.update(torch.from_numpy(part))
        stream.update(torch.empty(0, 7))
        expected = rows.astype(np.float64).var(axis=0, ddof=1)
        np.testing.assert_allclose(stream.variance().numpy(), expected, rtol=1e-4)
        assert stream.count == 5000


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        RunningMoments(2).update(torch.tensor([[0.0, float("nan")], [0.0, 0.0]]))


def test_one_position_has_no_variance():
    stream = RunningMoments(2)
    stream.update(torch.zeros(1, 2))
    with pytest.raises(DataError, match="1 rows have no variance"):
        stream.variance()


def test_flap_squares_the_attention_metric_and_scores_channels_before_the_head_mean():
    variance, norm = [1.0, 2.0, 3.0, 4.0, 5.0, 9.0], [2.0] * 6
    attn = moments(0, "attn", variance, norm)
    squared = (np.asarray(variance) * 2) ** 2
    z = (squared - squared.mean()) / squared.std(ddof=1)
    scores = score_units([attn], [attn], head_dim=3)
    np.testing.assert_allclose(scores.i_s, [z[:3].mean(), z[3:].mean()], rtol=1e-6)


def test_plain_takes_the_head_mean_before_the_z_score():
    attn = moments(0, "attn", [1.0, 3.0, 5.0, 7.0, 2.0, 2.0], [1.0] * 6)
    scores = score_units([attn], [attn], head_dim=2, variant="plain")
    np.testing.assert_allclose(scores.i_u, z([2, 6, 2]), rtol=1e-6)


def z(values):
    values = np.asarray(values, float)
    return (values - values.mean()) / values.std(ddof=1)


def test_scores_are_taken_within_layer_and_module():
    # Layer 1 is a thousand times louder; within a layer the ranking is the same.
    parts = [
        moments(layer, "mlp", np.array([1.0, 2.0, 6.0]) * gain, [1.0] * 3)
        for layer, gain in ((0, 1.0), (1, 1000.0))
    ]
    scores = score_units(parts, parts, head_dim=1)
    np.testing.assert_allclose(scores.i_s[:3], scores.i_s[3:], rtol=1e-6)
    assert scores.layer.tolist() == [0, 0, 0, 1, 1, 1]
    assert scores.index.tolist() == [0, 1, 2, 0, 1, 2]
    assert scores.kind.tolist() == [1] * 6


def test_units_all_alike_score_zero_and_not_nan():
    flat = moments(0, "mlp", [2.0] * 3, [1.0] * 3)
    assert score_units([flat], [flat], head_dim=1).i_s.tolist() == [0, 0, 0]


def test_moments_of_different_modules_are_refused():
    mlp, attn = moments(0, "mlp", [1.0], [1.0]), moments(0, "attn", [1.0], [1.0])
    with pytest.raises(ConfigurationError, match="different modules"):
        score_units([mlp], [attn], head_dim=1)


def test_rows_that_do_not_count_are_left_out_whatever_they_hold():
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) + 30
    counted = torch.arange(40) % 3 > 0
    wanted, found, beside_nan = (RunningMoments(5) for _ in range(3))
    for part in (slice(0, 10), slice(10, 40)):
        wanted.update(rows[part][counted[part]])
        found.update(rows[part], counted[part])
        beside_nan.update(rows[part].masked_fill(~counted[part, None], torch.nan), counted[part])
    for moments in (found, beside_nan):
        assert moments.count == wanted.count == int(counted.sum())
        torch.testing.assert_close(moments.mean(), wanted.mean(), rtol=1e-6, atol=0)
        torch.testing.assert_close(moments.variance(), wanted.variance(), rtol=1e-4, atol=0)
    with pytest.raises(NonFiniteError):
        found.update(rows.masked_fill(counted[:, None], torch.nan), counted)


def test_a_batch_is_summed_in_parts_as_it_is_whole(monkeypatch):
    rows = torch.randn(6, 9, 4, generator=torch.Generator().manual_seed(1)) * 0.01 + 50
    counted = torch.rand(6, 9, generator=torch.Generator().manual_seed(2)) > 0.3
    wanted = rows[counted].double()
    for numbers in (1, 40, 1 << 18):
        monkeypatch.setattr("probes.location.importance._IN_CACHE", numbers)
        moments = RunningMoments(4)
        moments.update(rows[:1], counted[:1])
        moments.update(rows[1:], counted[1:])
        assert moments.count == len(wanted)
        torch.testing.assert_close(moments.mean(), wanted.mean(0), rtol=1e-7, atol=0)
        torch.testing.assert_close(moments.variance(), wanted.var(0), rtol=1e-4, atol=0)
