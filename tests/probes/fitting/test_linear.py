"""Fitting: a planted direction is found, whatever the loss, and labels mean what is said."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from probes.activations.features import ResponseFeatures, columns_of, label_segments
from probes.fitting.cross_validation import choose_c, cross_validated_auroc
from probes.fitting.linear import FitConfig, LinearProbeFitter
from probes.fitting.multi_head import fit_heads, stacked
from probes.fitting.streaming import fit_streamed
from probes.fitting.windowed_loss import Windows
from safe_decode.activations.site import Site
from safe_decode.errors import ConfigurationError, DataError, NonFiniteError

SITES = (Site(0, "attn", (1, 4, 5)), Site(1, "mlp", tuple(range(9))))
WIDTH = 12


def planted(n=120, seed=0, *, known_onset=True, strength=2.0, dtype=np.float32):
    """Responses of uneven length and scale, harmful from their onset along one direction."""
    rng = np.random.default_rng(seed)
    direction = np.random.default_rng(99).normal(size=WIDTH)
    direction /= np.linalg.norm(direction)
    scale = np.logspace(-2, 2, WIDTH)  # features of very different size
    responses, onsets, harmful = [], [], []
    for row in range(n):
        tokens = int(rng.integers(6, 40))
        values = rng.normal(size=(tokens + 1, WIDTH))
        label, onset = row % 2 == 0, int(rng.integers(0, tokens - 4))
        if label:
            values[onset + 1 :] += strength * direction
        responses.append((values * scale + 5 * scale).astype(dtype))
        onsets.append(onset if label and known_onset else None)
        harmful.append(label)
    return ResponseFeatures(SITES, tuple(responses), tuple(onsets)), harmful, direction / scale


def cosine(a, b, scale):
    a, b = a * scale, b * scale
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("method", ["pooled", "token", "windowed", "mass_mean"])
def test_the_fitter_finds_the_planted_direction(method):
    features, harmful, direction = planted(strength=3.0)
    fitted = LinearProbeFitter(FitConfig(method=method, c=0.1, window=4)).fit(features, harmful)
    weight = fitted.probe.weight[:, 0].double().numpy()
    assert cosine(weight, direction, np.logspace(-2, 2, WIDTH)) > 0.9
    fresh, labels, _ = planted(seed=1, strength=3.0)
    peaks = [
        np.convolve(fitted.probe(torch.from_numpy(r))[:, 0].numpy(), np.ones(4) / 4, "valid").max()
        for r in fresh.responses
    ]
    assert roc_auc_score(labels, peaks) > 0.99
    assert fitted.benign_mean[0] < 0
    assert fitted.converged


def test_the_windowed_loss_needs_no_onset():
    features, harmful, direction = planted(known_onset=False, strength=3.0)
    fitted = LinearProbeFitter(FitConfig(method="windowed", window=4)).fit(features, harmful)
    weight = fitted.probe.weight[:, 0].double().numpy()
    assert cosine(weight, direction, np.logspace(-2, 2, WIDTH)) > 0.9


def test_shuffled_labels_find_nothing():
    features, harmful, direction = planted()
    shuffled = np.random.default_rng(3).permutation(harmful).tolist()
    free = ResponseFeatures(SITES, features.responses, (None,) * len(features))
    fitted = LinearProbeFitter(FitConfig()).fit(free, shuffled)
    weight = fitted.probe.weight[:, 0].double().numpy()
    assert abs(cosine(weight, direction, np.logspace(-2, 2, WIDTH))) < 0.7


def test_long_responses_weigh_no_more_than_short_ones():
    # A long harmless response full of the opposite evidence must not outvote forty short ones.
    rng = np.random.default_rng(0)
    site = (Site(0, "resid", (0,)),)
    short = [rng.normal(loc=1.0 if row % 2 else -1.0, size=(4, 1)) for row in range(40)]
    long = np.full((4000, 1), 1.0) + rng.normal(size=(4000, 1))
    labels = [bool(row % 2) for row in range(40)] + [False]
    responses = tuple(v.astype(np.float32) for v in [*short, long])
    features = ResponseFeatures(site, responses, (None,) * 41)
    config = FitConfig(tokens_per_response=5000)
    assert float(LinearProbeFitter(config).fit(features, labels).probe.weight) > 0.5


def test_dead_features_get_no_weight_and_are_counted():
    features, harmful, _ = planted()
    for values in features.responses:
        values[:, 3] = 7.0
        values[:, 5] = 1e-9 * np.arange(len(values))
    fitted = LinearProbeFitter().fit(features, harmful)
    assert fitted.dead_features == 2
    assert fitted.probe.weight[[3, 5], 0].tolist() == [0.0, 0.0]


def test_the_benign_mean_is_the_mean_logit_of_harmless_responses():
    features, harmful, _ = planted(n=20)
    fitted = LinearProbeFitter().fit(features, harmful)
    means = [
        float(fitted.probe(torch.from_numpy(r)).mean())
        for r, label in zip(features.responses, harmful, strict=True)
        if not label
    ]
    assert fitted.benign_mean[0] == pytest.approx(np.mean(means), abs=1e-4)


def test_float16_storage_fits_the_same_probe():
    features, harmful, _ = planted()
    half = ResponseFeatures(
        SITES, tuple(r.astype(np.float16) for r in features.responses), features.onset_tokens
    )
    a = LinearProbeFitter().fit(features, harmful).probe.weight
    b = LinearProbeFitter().fit(half, harmful).probe.weight
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(a.abs().max()))


def test_labels_begin_at_the_score_that_judges_the_onset_token():
    values = np.zeros((5, WIDTH), np.float32)
    features = ResponseFeatures(SITES, (values,) * 4, (None, 0, 2, None))
    segments = label_segments(features, [True, True, True, False])
    spans = [(s.row, s.start, s.stop, s.harmful, s.weight) for s in segments]
    assert spans == [
        (0, 1, 5, True, 1.0),
        (1, 0, 1, False, 0.5),
        (1, 1, 5, True, 0.5),
        (2, 0, 3, False, 0.5),
        (2, 3, 5, True, 0.5),
        (3, 0, 5, False, 1.0),
    ]
    excluded = label_segments(features, [True, True, True, False], before_onset="exclude")
    assert [(s.row, s.start, s.weight) for s in excluded] == [
        (0, 1, 1.0),
        (1, 1, 1.0),
        (2, 3, 1.0),
        (3, 0, 1.0),
    ]


def test_window_means_equal_their_definition_and_never_cross_a_segment():
    logits = torch.randn(12, dtype=torch.float64)
    sizes = np.array([5, 2, 5])
    windows = Windows.over(sizes, np.array([True, False, True]), np.ones(3), width=3)
    expected = [logits[i : i + 3].mean() for i in (0, 1, 2)]
    expected += [logits[5:7].mean()]
    expected += [logits[7 + i : 10 + i].mean() for i in (0, 1, 2)]
    torch.testing.assert_close(windows.means(logits), torch.stack(expected))
    assert windows.segment.tolist() == [0, 0, 0, 1, 2, 2, 2]


def test_the_windowed_loss_equals_its_definition():
    logits = torch.randn(9, dtype=torch.float64)
    windows = Windows.over(np.array([4, 5]), np.array([True, False]), np.array([1.0, 0.5]), width=2)
    total = 0.0
    for start, stop, label, weight in ((0, 4, 1.0, 1.0), (4, 9, 0.0, 0.5)):
        means = torch.stack([logits[i : i + 2].mean() for i in range(start, stop - 1)])
        share = torch.softmax(means / 0.7, 0)
        loss = -(label * torch.sigmoid(means).log() + (1 - label) * torch.sigmoid(-means).log())
        total += weight * float((share * loss).sum())
    assert float(windows.loss(logits, 0.7)) == pytest.approx(total)


def test_cross_validation_leaves_groups_out_whole():
    # Every group carries its own fingerprint; rows of a group split apart would be recognised.
    rng = np.random.default_rng(0)
    responses, labels, groups = [], [], []
    for group in range(40):
        mark = rng.normal(size=WIDTH) * 3
        for _ in range(3):
            responses.append((rng.normal(size=(8, WIDTH)) * 0.1 + mark).astype(np.float32))
            labels.append(group % 2 == 0)
            groups.append(f"g{group}")
    features = ResponseFeatures(SITES, tuple(responses), (None,) * len(responses))
    assert cross_validated_auroc(features, labels, groups, FitConfig(c=10)) < 0.75
    planted_features, planted_labels, _ = planted(strength=3.0)
    names = [str(i) for i in range(len(planted_features))]
    assert cross_validated_auroc(planted_features, planted_labels, names, FitConfig()) > 0.9


def test_columns_are_found_by_layer_kind_and_channel():
    wanted = (Site(1, "mlp", (2, 8)), Site(0, "attn", (5,)))
    assert columns_of(SITES, wanted).tolist() == [2, 5, 11]
    with pytest.raises(ConfigurationError, match="channel 2 of attn in layer 0 was not harvested"):
        columns_of(SITES, (Site(0, "attn", (2,)),))


def test_input_that_cannot_be_fitted_is_refused():
    features, harmful, _ = planted(n=6)
    with pytest.raises(DataError, match="all 6 responses are harmless"):
        LinearProbeFitter().fit(features, [False] * 6)
    with pytest.raises(ConfigurationError, match="5 labels for 6 responses"):
        LinearProbeFitter().fit(features, harmful[:5])
    with pytest.raises(ConfigurationError, match=r"c=0 must be above 0"):
        FitConfig(c=0)
    with pytest.raises(ConfigurationError, match=r"wanted \[T \+ 1, 12\]"):
        ResponseFeatures(SITES, (np.zeros((3, 4)),), (None,))
    late = ResponseFeatures(SITES, features.responses, (500, *features.onset_tokens[1:]))
    with pytest.raises(ConfigurationError, match="harmful from token 500"):
        LinearProbeFitter().fit(late, harmful)
    features.responses[0][0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        LinearProbeFitter().fit(features, harmful)
    dead = ResponseFeatures(SITES, tuple(np.ones((4, WIDTH)) for _ in range(6)), (None,) * 6)
    with pytest.raises(DataError, match="all 12 features are constant"):
        LinearProbeFitter().fit(dead, harmful)


def test_c_is_chosen_by_groups_left_out():
    # Marks of groups tempt a weak penalty; only what holds across groups is worth anything.
    rng = np.random.default_rng(0)
    responses, labels, groups = [], [], []
    for group in range(60):
        mark = rng.normal(size=WIDTH) * 2
        mark[0] = 1.0 if group % 2 else -1.0
        for _ in range(2):
            responses.append((rng.normal(size=(8, WIDTH)) * 0.3 + mark).astype(np.float32))
            labels.append(bool(group % 2))
            groups.append(f"g{group}")
    features = ResponseFeatures(SITES, tuple(responses), (None,) * len(responses))
    chosen = choose_c(features, labels, groups, FitConfig(), grid=(1e-3, 0.1, 100.0))
    assert set(chosen.aurocs) == {1e-3, 0.1, 100.0}
    assert chosen.aurocs[chosen.c] == max(chosen.aurocs.values())
    with pytest.raises(ConfigurationError, match="grid is empty"):
        choose_c(features, labels, groups, FitConfig(), grid=())


@pytest.mark.parametrize("method", ["pooled", "token", "windowed", "mass_mean"])
def test_a_streamed_fit_is_the_stored_one(method):
    features, harmful, _ = planted(strength=2.0)
    config = FitConfig(method=method, c=0.1, window=4, tokens_per_response=7)
    passes = []

    def stream():
        passes.append(1)
        order = np.random.default_rng(len(passes)).permutation(len(features))
        for start in range(0, len(order), 16):
            yield [(int(row), features.responses[row]) for row in order[start : start + 16]]

    stored = LinearProbeFitter(config).fit(features, harmful)
    lengths = [len(values) for values in features.responses]
    found = fit_streamed(stream, SITES, lengths, features.onset_tokens, harmful, config)
    largest = float(stored.probe.weight.abs().max())
    torch.testing.assert_close(
        found.probe.weight, stored.probe.weight, rtol=0.02, atol=0.02 * largest
    )
    assert found.benign_mean == pytest.approx(stored.benign_mean, rel=0.05)
    assert found.dead_features == stored.dead_features
    assert len(passes) <= {"pooled": 3, "mass_mean": 5}.get(method, 200)


def test_several_heads_read_several_sites_and_keep_their_logits():
    features, harmful, _ = planted()
    one = LinearProbeFitter(FitConfig()).fit(features.at(SITES[:1]), harmful)
    two = LinearProbeFitter(FitConfig(method="mass_mean")).fit(features, harmful)
    both = stacked({"a": one, "b": two})
    assert both.probe.heads == ("a", "b")
    values = torch.from_numpy(features.responses[0])
    expected = torch.cat([one.probe(values[:, :3]), two.probe(values)], dim=1)
    torch.testing.assert_close(both.probe(values), expected)
    assert both.benign_mean == (*one.benign_mean, *two.benign_mean)


def test_each_category_gets_a_head_where_it_has_enough_rows():
    features, harmful, _ = planted(n=120)
    names = ["theft" if row % 4 == 0 else "rare" if row == 2 else None for row in range(120)]
    found = fit_heads(features, harmful, names, FitConfig(), least=20)
    assert found.probe.heads == ("harm", "harm:theft")
    whole = LinearProbeFitter(FitConfig()).fit(features, harmful)
    torch.testing.assert_close(found.probe.weight[:, :1], whole.probe.weight)


def test_the_penalty_grows_with_the_number_of_features_where_none_is_given():
    assert FitConfig().for_features(64).c == FitConfig().for_features(256).c == 0.1
    assert FitConfig().for_features(2560).c == pytest.approx(0.01)
    assert FitConfig(c=3.0).for_features(2560).c == 3.0
    assert "C=" not in FitConfig().label and "C=0.1" in FitConfig().for_features(8).label
    with pytest.raises(ConfigurationError, match="c=0"):
        FitConfig(c=0.0)
