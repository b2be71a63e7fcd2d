"""ONNX, NumPy and torch say the same, and a bundle is scored without torch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from probes.calibration.statistic import smoothed_paths
from probes.export.onnx import MONITOR_FILE, PROBE_FILE, export_onnx
from probes.export.parity import agreement
from safe_decode.bundle.numpy_runtime import NumpyBundle
from safe_decode.certificate import Certificate
from safe_decode.errors import BundleCorruptError, BundleError, CertificateError, ConfigurationError
from tests.bundles import random_bundle

ROOT = Path(__file__).resolve().parents[3]
STATISTICS = [
    {},
    {"kind": "mean", "window": 1},
    {"kind": "mean", "window": 5, "hits": 3},
    {"kind": "cusum", "drift": 0.3},
    {"kind": "shrunk", "window": 8},
    {"kind": "top", "window": 3, "best": 2},
    {"kind": "bank", "window": 8, "offset": (0.1, -0.2, 0.0, 0.3), "scale": (1.0, 0.5) * 2},
    {"hits": 2},
    {"boundary_at": (0, 4, 60), "boundary": (2.0, -1.0, 0.5)},
    {"kind": "shrunk", "window": 8, "boundary_at": (3,), "boundary": (0.25,)},
]


def bundle_with(llama, tokenizer, changes):
    bundle = random_bundle(llama, tokenizer)
    certificates = bundle.certificates
    if changes.get("kind") == "cusum":  # a sum is never below what it starts from
        certificates = tuple(
            Certificate.compute(
                [abs(value) for value in one.maxima],
                alpha=one.alpha,
                delta=one.delta,
                population=one.population,
                envelope=one.envelope,
            )
            for one in certificates
        )
    monitor = replace(bundle.monitor, **changes)
    return replace(bundle, monitor=monitor, certificates=certificates)


@pytest.mark.parametrize("changes", STATISTICS)
def test_the_three_agree_step_by_step(llama, tokenizer, tmp_path, changes):
    pytest.importorskip("onnxruntime")
    bundle = bundle_with(llama, tokenizer, changes)
    export_onnx(bundle, tmp_path)
    found = agreement(bundle, tmp_path, steps=150)
    assert 0 < found.largest <= 1e-5
    assert found.flags_differ == 0


@pytest.mark.slow
@pytest.mark.parametrize("changes", STATISTICS)
def test_the_three_agree_over_ten_thousand_steps(llama, tokenizer, tmp_path, changes):
    pytest.importorskip("onnxruntime")
    bundle = bundle_with(llama, tokenizer, changes)
    export_onnx(bundle, tmp_path)
    found = agreement(bundle, tmp_path, steps=10_000)
    assert found.largest <= 1e-5
    assert found.flags_differ == 0


def test_a_disagreement_is_found(llama, tokenizer, tmp_path):
    pytest.importorskip("onnxruntime")
    bundle = random_bundle(llama, tokenizer)
    export_onnx(bundle, tmp_path)
    moved = replace(bundle, monitor=replace(bundle.monitor, smoothing=0.31))
    assert agreement(moved, tmp_path, steps=50).largest > 1e-3


def test_the_graphs_say_what_they_are(llama, tokenizer, tmp_path):
    onnx = pytest.importorskip("onnx")
    bundle = random_bundle(llama, tokenizer)
    for file in export_onnx(bundle, tmp_path, alpha=0.05):
        model = onnx.load(file)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert facts["bundle"] == bundle.digest
    assert float(facts["threshold"]) == bundle.certificate(0.05).threshold
    assert sorted(p.name for p in tmp_path.iterdir()) == [PROBE_FILE, MONITOR_FILE]
    with pytest.raises(CertificateError, match=r"alpha=0.2 is not certified"):
        export_onnx(bundle, tmp_path, alpha=0.2)


@pytest.mark.parametrize("changes", STATISTICS)
def test_a_portable_bundle_scores_as_torch_does(llama, tokenizer, tmp_path, changes):
    bundle = bundle_with(llama, tokenizer, changes)
    bundle.save(tmp_path / "bundle")
    portable = NumpyBundle.load(tmp_path / "bundle")
    features = np.random.default_rng(0).normal(size=(40, portable.n_features))
    features = features.astype(np.float32)
    found = portable.score(features)
    logits = bundle.probe(torch.from_numpy(features))
    np.testing.assert_allclose(found.logits, logits.numpy(), rtol=1e-5, atol=1e-5)
    (path,) = smoothed_paths([logits], bundle.monitor)
    np.testing.assert_allclose(found.smoothed, path, rtol=1e-5, atol=1e-5)
    assert found.statistic == max(found.smoothed)
    above = np.flatnonzero(path > bundle.certificate().threshold)
    assert found.alarm_step == (int(above[0]) if len(above) else None)
    assert portable.digest == bundle.digest


def test_a_portable_row_that_is_not_finite_says_so(llama, tokenizer, tmp_path):
    for changes in STATISTICS:
        bundle_with(llama, tokenizer, changes).save(tmp_path / "bundle")
        portable = NumpyBundle.load(tmp_path / "bundle")
        features = np.zeros((2, portable.n_features), np.float32)
        state = portable.step(portable.start(2), features)
        features[1, 0] = np.inf
        state = portable.step(state, features)
        state = portable.step(state, np.zeros_like(features))
        assert state.finite.tolist() == [True, False]


def test_scoring_a_bundle_loads_no_torch(llama, tokenizer, tmp_path):
    random_bundle(llama, tokenizer).save(tmp_path / "bundle")
    code = (
        "import sys, numpy\n"
        "from safe_decode.bundle.numpy_runtime import NumpyBundle\n"
        f"bundle = NumpyBundle.load({str(tmp_path / 'bundle')!r})\n"
        "found = bundle.score(numpy.ones((3, bundle.n_features)))\n"
        "print(found.logits.shape, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["(3,", "2)", "False"]


def test_a_bundle_that_is_not_whole_is_refused_without_torch_too(llama, tokenizer, tmp_path):
    path = tmp_path / "bundle"
    random_bundle(llama, tokenizer).save(path)
    with pytest.raises(CertificateError, match="alpha=0.3 is not certified"):
        NumpyBundle.load(path, alpha=0.3)
    with pytest.raises(ConfigurationError, match="features have 3 channels"):
        NumpyBundle.load(path).logits(np.zeros((1, 3)))
    probe = path / "probe.safetensors"
    probe.write_bytes(probe.read_bytes()[:-1])
    with pytest.raises(BundleCorruptError, match="truncated"):
        NumpyBundle.load(path)
    with pytest.raises(BundleError, match=r"holds no card\.json"):
        NumpyBundle.load(tmp_path)


def test_a_graph_and_a_portable_bundle_take_the_cap_that_covers_an_answer(
    llama, tokenizer, tmp_path
):
    onnx = pytest.importorskip("onnx")
    bundle = random_bundle(llama, tokenizer)
    whole = bundle.certificate()
    first = Certificate.compute(
        [value - 1 for value in whole.maxima],
        alpha=whole.alpha,
        delta=whole.delta,
        population="benign",
        envelope=replace(whole.envelope, max_new_tokens=8),
        dtype=whole.dtype,
    )
    both = replace(bundle, certificates=(*bundle.certificates, first))
    both.save(tmp_path / "bundle")
    for tokens, expected in ((8, first), (9, whole), (None, whole)):
        portable = NumpyBundle.load(tmp_path / "bundle", tokens=tokens)
        assert portable.threshold == expected.threshold
        _, monitor = export_onnx(both, tmp_path / "graphs", tokens=tokens)
        facts = {entry.key: entry.value for entry in onnx.load(monitor).metadata_props}
        assert float(facts["threshold"]) == expected.threshold
