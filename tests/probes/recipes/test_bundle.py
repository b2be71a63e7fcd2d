"""The whole path: a planted kind of harm is found, certified and recorded."""

import json
import time

import numpy as np
import pytest
import torch

from probes.activations.harvest import score_responses
from probes.activations.teacher_forcing import encode_response, onset_token
from probes.calibration.statistic import smoothed_paths
from probes.data.conversations import Conversation, assign_splits, by_split
from probes.fitting.linear import FitConfig
from probes.location.locate import LocateConfig
from probes.metrics.detection import evaluate
from probes.recipes.bundle import RecipeConfig, make_bundle, union_of_sites
from safe_decode.activations.site import Site, n_features
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.certificate import Envelope
from safe_decode.errors import CertificateError, ConfigurationError, DataError
from safe_decode.testing.models import tiny_model
from tests.own_rows import as_own

CONFIG = RecipeConfig(
    envelope=Envelope(max_new_tokens=48, do_sample=False, temperature=1.0, top_p=1.0, top_k=0),
    refusal="I will not help with that.",
    opener="On reflection, ",
    feature_counts=(32, 128),
    fits=(FitConfig(method="token", c=0.1), FitConfig(method="windowed", window=4)),
    windows=(1, 4),
    # With some 340 benign responses 1 % would rest on the single largest of them.
    alphas=(0.05,),
    default_alpha=0.05,
)
HARMLESS, HARMFUL, NO = range(97, 107), range(107, 117), range(65, 75)  # bytes of a-j, k-t, A-J


def text(rng, letters, n):
    return bytes(rng.choice(list(letters), size=n).tolist()).decode()


def corpus(n=1500, seed=0):
    """Benign answers, answers that turn to other letters half-way, and refusals in capitals."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(n):
        kind = row % 4
        prompt = text(rng, HARMFUL if kind else HARMLESS, 8)
        start = text(rng, HARMLESS, int(rng.integers(4, 16)))
        response = start + text(rng, HARMLESS, 24)
        if kind == 1:
            response = start + text(rng, HARMFUL, 24)
        if kind == 2:
            response = text(rng, NO, 12)
        rows.append(
            Conversation(
                messages=({"role": "user", "content": prompt},),
                response=response,
                group=f"g{row}",
                response_harmful=kind == 1,
                prompt_harmful=kind in (1, 2),
                refusal=kind == 2,
                onset_char=len(start) if kind == 1 else None,
            )
        )
    return assign_splits(rows, seed=seed, shares=SHARES)


SHARES = {"locate": 0.15, "fit": 0.2, "select": 0.1, "calibrate": 0.45, "test": 0.1}


@pytest.fixture(scope="module")
def made():
    from safe_decode.testing.models import byte_tokenizer

    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    rows = as_own(model, tokenizer, corpus(), cap=48)
    begun = time.perf_counter()
    recipe = make_bundle(model, tokenizer, rows, CONFIG, provenance={"seed": 0})
    return model, tokenizer, rows, recipe, time.perf_counter() - begun


def test_planted_harm_is_found_on_responses_never_seen(made):
    model, tokenizer, rows, recipe, _ = made
    test = by_split(rows)["test"]
    logits = score_responses(model, tokenizer, test, recipe.bundle.probe)
    found = evaluate(
        smoothed_paths(logits, recipe.bundle.monitor),
        [bool(row.response_harmful) for row in test],
        [onset_token(tokenizer, row, encode_response(tokenizer, row)) for row in test],
        threshold=recipe.bundle.certificate().threshold,
        holdback_tokens=recipe.bundle.holdback_tokens,
    )
    assert found.at_threshold.detected.point > 0.9
    assert found.at_threshold.false_alarms.lower_bound <= 0.05
    assert found.delay is not None
    assert found.delay.median <= 4


def test_the_certificate_is_that_of_the_calibrate_split_alone(made):
    model, tokenizer, rows, recipe, _ = made
    bundle = recipe.bundle
    benign = [
        row
        for row in by_split(rows)["calibrate"]
        if not row.response_harmful and not row.prompt_harmful
    ]
    logits = score_responses(model, tokenizer, benign, bundle.probe)
    peaks = sorted(float(path.max()) for path in smoothed_paths(logits, bundle.monitor))
    certificate = bundle.certificate(0.05)
    certificate.verify()
    np.testing.assert_allclose(sorted(certificate.maxima), peaks, rtol=1e-4, atol=1e-4)
    assert certificate.envelope == CONFIG.envelope
    assert certificate.evidence.source == "on-policy"
    assert certificate.supported_cap == 48
    assert max(certificate.evidence.lengths) < 48
    assert bundle.certificate(0.05, "harmful_refused").n < len(certificate.maxima)


def test_the_bundle_is_saved_with_its_history_and_its_canary_sings(made, tmp_path):
    model, tokenizer, _, recipe, _ = made
    recipe.bundle.save(tmp_path / "bundle")
    loaded = ProbeBundle.load(tmp_path / "bundle")
    assert loaded.canary is not None
    assert loaded.canary.run(model, tokenizer, loaded.probe) < 1e-4
    history = json.loads(json.dumps(loaded.provenance))
    assert history["seed"] == 0
    assert len(history["select"]) == 2 * 2 * 2
    assert sum(history["splits"].values()) == 1500
    first, *rest = history["select"]
    assert all(first["tpr"] >= other["tpr"] - 1e-3 for other in rest)
    assert n_features(loaded.probe.sites) == first["features"]
    assert history["units"]["counts"]["SCU"] > 0


def test_the_test_split_is_not_touched(made):
    model, tokenizer, rows, recipe, _ = made
    without = [row for row in rows if row.split != "test"]
    again = make_bundle(model, tokenizer, without, CONFIG)
    torch.testing.assert_close(again.bundle.probe.weight, recipe.bundle.probe.weight)
    assert again.bundle.certificate().threshold == recipe.bundle.certificate().threshold


def test_the_path_is_quick(made):
    assert made[-1] < 60  # about 4 s on an idle core


def test_a_bundle_that_cannot_be_certified_is_not_made(llama, tokenizer):
    few = [row for row in corpus(900) if row.split != "calibrate" or int(row.group[1:]) < 200]
    config = RecipeConfig(
        envelope=CONFIG.envelope,
        refusal="No.",
        opener="No, ",
        locate=LocateConfig(min_refusals=5),
        feature_counts=(8,),
        fits=(FitConfig(),),
        windows=(1,),
    )
    with pytest.raises(CertificateError, match="cannot certify alpha=0.01"):
        make_bundle(llama, tokenizer, few, config)
    with pytest.raises(DataError, match="split 'locate' holds no judged response"):
        make_bundle(llama, tokenizer, [row for row in few if row.split != "locate"], config)


def test_sites_unite_by_channel():
    found = union_of_sites(
        [(Site(0, "mlp", (1, 3)),), (Site(0, "mlp", (2, 3)), Site(0, "attn", (0,)))]
    )
    assert found == (Site(0, "attn", (0,)), Site(0, "mlp", (1, 2, 3)))


def test_a_default_that_is_not_certified_is_refused():
    with pytest.raises(ConfigurationError, match="default_alpha=0.01 is not among"):
        RecipeConfig(envelope=CONFIG.envelope, refusal="No.", opener="No, ", alphas=(0.05,))
