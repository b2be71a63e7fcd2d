"""A bundle comes back as it was saved, or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.files import CALIBRATION, CARD, PROBE, WITH_PAST, card_digest
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.certificate import Certificate
from safe_decode.errors import (
    BundleCorruptError,
    BundleError,
    CertificateError,
    ConfigurationError,
    FingerprintMismatchError,
)
from safe_decode.monitor.config import StatisticKind
from safe_decode.probe.linear import LinearProbe
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.bundles import ENVELOPE, random_bundle


@pytest.fixture(scope="module")
def bundle() -> ProbeBundle:
    return random_bundle(tiny_model(), byte_tokenizer())


@pytest.fixture
def saved(bundle: ProbeBundle, tmp_path: Path) -> Path:
    bundle.save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_bundle_comes_back_as_it_was_saved(bundle: ProbeBundle, saved: Path) -> None:
    loaded = ProbeBundle.load(saved)
    features = torch.randn(3, 7)
    assert torch.equal(loaded.probe(features), bundle.probe(features))
    assert loaded.probe.sites == bundle.probe.sites
    assert loaded.certificates == bundle.certificates
    assert loaded.monitor == bundle.monitor
    assert loaded.fingerprint == bundle.fingerprint
    assert (loaded.refusal, loaded.opener) == (bundle.refusal, bundle.opener)
    assert (loaded.holdback_tokens, loaded.default_alpha) == (4, 0.01)
    assert loaded.provenance == bundle.provenance
    assert loaded.canary is not None and bundle.canary is not None
    assert torch.equal(loaded.canary.logits, bundle.canary.logits)
    assert loaded.canary.ids == bundle.canary.ids
    assert loaded.digest == bundle.digest


def test_a_bundle_without_a_canary_comes_back(bundle: ProbeBundle, tmp_path: Path) -> None:
    replace(bundle, canary=None).save(tmp_path / "b")
    assert ProbeBundle.load(tmp_path / "b").canary is None


def test_the_digest_follows_every_part(bundle: ProbeBundle) -> None:
    changes: list[dict[str, Any]] = [
        {"refusal": "No."},
        {"holdback_tokens": 5},
        {"monitor": replace(bundle.monitor, smoothing=0.31)},
        {
            "probe": LinearProbe(
                bundle.probe.sites, bundle.probe.weight + 1, bundle.probe.bias, bundle.probe.heads
            )
        },
        {"certificates": bundle.certificates[:2]},
    ]
    digests = {replace(bundle, **change).digest for change in changes}
    assert len(digests | {bundle.digest}) == len(changes) + 1


def test_saving_again_replaces_and_leaves_nothing_beside(bundle: ProbeBundle, saved: Path) -> None:
    replace(bundle, refusal="No.").save(saved)
    assert ProbeBundle.load(saved).refusal == "No."
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]
    assert sorted(path.name for path in saved.iterdir()) == [CALIBRATION, CARD, PROBE]


def test_a_failed_save_leaves_the_old_bundle(
    bundle: ProbeBundle, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == CARD and not broken:
            broken.append(target)
            raise OSError("disk full")
        return original(self, target)

    broken: list[Path] = []
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(BundleError, match="cannot be written: disk full"):
        replace(bundle, refusal="No.").save(saved)
    monkeypatch.undo()
    assert ProbeBundle.load(saved).refusal == bundle.refusal
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]
    assert sorted(path.name for path in saved.iterdir()) == [CALIBRATION, CARD, PROBE]


def test_a_directory_that_is_no_bundle_is_not_replaced(bundle: ProbeBundle, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    with pytest.raises(BundleError, match="exists and is no bundle"):
        bundle.save(tmp_path / "thesis")
    assert (tmp_path / "thesis").exists()


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no card\.json; pass the directory"):
        ProbeBundle.load(tmp_path / "nowhere")


def test_certificates_are_found_by_level_and_population(bundle: ProbeBundle) -> None:
    assert bundle.certificate() == bundle.certificates[0]
    assert bundle.certificate(0.05, "hard_negative") == bundle.certificates[3]
    with pytest.raises(CertificateError, match=r"alpha=0\.2 is not certified .*\[0\.01, 0\.05\]"):
        bundle.certificate(0.2)
    with pytest.raises(CertificateError, match="this population has no certificate"):
        bundle.certificate(0.01, "poems")


@pytest.mark.parametrize("name", [CARD, PROBE, CALIBRATION])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, name: str, part: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(BundleCorruptError, match="bundle .*"):
        ProbeBundle.load(saved)


@pytest.mark.parametrize("name", [PROBE, CALIBRATION])
def test_a_missing_or_changed_file_is_named(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    content[-1] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(BundleCorruptError, match=f"{name} .* truncated or from another bundle"):
        ProbeBundle.load(saved)
    (saved / name).unlink()
    with pytest.raises(BundleCorruptError, match=name):
        ProbeBundle.load(saved)


def forge(
    path: Path,
    card: Callable[[dict[str, Any]], object] = lambda _: None,
    tensors: Callable[[dict[str, torch.Tensor]], object] = lambda _: None,
    name: str = PROBE,
) -> None:
    """Change a bundle and mend all its digests, as a buggy exporter would."""
    held = load_file(path / name)
    tensors(held)
    save_file(held, path / name)
    record = json.loads((path / CARD).read_text())
    record["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    card(record)
    record["digest"] = card_digest(record)
    (path / CARD).write_text(json.dumps(record))


def test_a_forged_bundle_without_changes_loads(saved: Path) -> None:
    forge(saved)
    ProbeBundle.load(saved)


def test_a_hand_edited_card_is_refused_with_the_remedy(saved: Path) -> None:
    record = json.loads((saved / CARD).read_text())
    record["monitor"]["smoothing"] = 0.2
    (saved / CARD).write_text(json.dumps(record))
    with pytest.raises(
        BundleCorruptError, match="changed by hand.* pass other texts to SafeDecoder"
    ):
        ProbeBundle.load(saved)


@pytest.mark.parametrize(
    ("forgery", "message"),
    [
        ({"tensors": lambda t: t["weight"].view(-1)[3:5].fill_(torch.nan)}, "weight holds 2 NaN"),
        ({"tensors": lambda t: t["bias"].fill_(torch.inf)}, "bias holds 2 NaN or infinite"),
        ({"tensors": lambda t: t["canary"].fill_(torch.nan)}, "canary's logits must be finite"),
        ({"tensors": lambda t: t.update(weight=t["weight"][:-1])}, r"weight \(6, 2\) and bias"),
        ({"tensors": lambda t: t.pop("bias")}, "'bias' is missing"),
        (
            {"card": lambda c: c.update(schema=9)},
            "schema 9, this version reads 1, 2, 3, 4 and 5",
        ),
        ({"card": lambda c: c.update(format="zip")}, "does not say format='safe-decode bundle'"),
        ({"card": lambda c: c.pop("monitor")}, "'monitor' is missing"),
        ({"card": lambda c: c.update(sites=[])}, "sites is empty"),
        ({"card": lambda c: c.update(sites=3)}, "corrupt"),
        ({"card": lambda c: c["monitor"].update(smoothing=3.0)}, r"smoothing=3\.0 is outside"),
        ({"card": lambda c: c["monitor"].update(mood=1)}, "mood"),
        ({"card": lambda c: c.update(default_alpha=0.3)}, r"alpha=0\.3 is not certified"),
        ({"card": lambda c: c.update(certificates=[])}, "no certificate"),
        (
            {"card": lambda c: c["certificates"][0].update(threshold=9.0)},
            r"threshold=9\.0 .* yield",
        ),
        ({"card": lambda c: c["certificates"][0].update(j=40)}, "j=40 .* yield"),
        ({"card": lambda c: c["certificates"][0].update(alpha=0.02)}, "yield; calibrate again"),
        (
            {"name": CALIBRATION, "tensors": lambda t: t["maxima_0"].view(-1)[0].fill_(torch.nan)},
            "maxima hold 1 NaN",
        ),
        ({"name": CALIBRATION, "tensors": lambda t: t.pop("maxima_1")}, "'maxima_1' is missing"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    saved: Path, forgery: dict[str, Any], message: str
) -> None:
    forge(saved, **forgery)
    with pytest.raises(BundleCorruptError, match=message):
        ProbeBundle.load(saved)


def test_nan_in_the_card_is_refused(saved: Path) -> None:
    text = (saved / CARD).read_text().replace('"smoothing": 0.3', '"smoothing": NaN')
    (saved / CARD).write_text(text)
    with pytest.raises(BundleCorruptError, match=r"card\.json holds NaN, wanted finite"):
        ProbeBundle.load(saved)


def test_a_bundle_for_another_model_is_refused(bundle: ProbeBundle) -> None:
    other = Fingerprint.of(tiny_model(seed=1), byte_tokenizer())
    with pytest.raises(FingerprintMismatchError, match="made for another model: weights of"):
        bundle.fingerprint.require(other)


def test_parts_that_do_not_fit_are_refused_before_saving(bundle: ProbeBundle) -> None:
    with pytest.raises(ConfigurationError, match="monitor has 1 heads, the probe 2"):
        replace(bundle, monitor=replace(bundle.monitor, start=(0.0,), offset=(0.0,), scale=(1.0,)))
    with pytest.raises(ConfigurationError, match="must hold text"):
        replace(bundle, refusal=" ")
    with pytest.raises(CertificateError, match="hold one twice"):
        replace(bundle, certificates=bundle.certificates * 2)


@pytest.mark.parametrize("kind", get_args(StatisticKind))
def test_a_statistic_that_older_readers_do_not_know_is_told_by_the_schema(
    llama, tokenizer, tmp_path, kind
):
    bundle = random_bundle(llama, tokenizer)
    levels = 2 if kind == "bank" else 1
    monitor = replace(
        bundle.monitor,
        kind=kind,
        window=4,
        offset=bundle.monitor.offset * levels,
        scale=bundle.monitor.scale * levels,
    )
    # A sum is never below what it starts from, which the stored maxima would contradict.
    peaks = [abs(value) for value in bundle.certificates[0].maxima]
    certificate = Certificate.compute(
        peaks, alpha=0.01, delta=0.05, population="benign", envelope=ENVELOPE
    )
    changed = replace(bundle, monitor=monitor, certificates=(certificate,))
    changed.save(tmp_path / "b")
    assert ProbeBundle.load(tmp_path / "b").monitor == monitor
    schema = json.loads((tmp_path / "b" / "card.json").read_text())["schema"]
    assert (schema >= WITH_PAST) == (kind not in ("ema", "mean", "cusum"))
