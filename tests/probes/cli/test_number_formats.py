"""Bundles made by default fit what a plain `from_pretrained` loads, and learn further formats."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from probes.data.conversations import write_jsonl
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.own_rows import as_own
from tests.probes.cli.test_workbench import refused, run, told
from tests.probes.recipes.test_bundle import corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("formats")
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    write_jsonl(root / "rows.jsonl", as_own(model, byte_tokenizer(), corpus(900), cap=48))
    return root


@pytest.fixture(scope="module")
def fitted(folder):
    return told(
        "fit", "--data", folder / "rows.jsonl", "--model", folder / "model", "--out",
        folder / "bundle", "--residual", "1", "--method", "token", "--statistic", "ema",
        "--alpha", 0.05,
    )  # fmt: skip


@pytest.fixture(scope="module")
def widened(folder, fitted):
    assert fitted["out"] == str(folder / "bundle")
    return told(
        "calibrate", "--bundle", folder / "bundle", "--model", folder / "model", "--data",
        folder / "rows.jsonl", "--out", folder / "both", "--dtype", "float32",
    )  # fmt: skip


def plain(folder, **options):
    """A model as users load it."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    return model.eval(), AutoTokenizer.from_pretrained(folder / "model")


def test_a_bundle_made_by_default_guards_what_a_plain_from_pretrained_loads(folder, fitted):
    bundle = ProbeBundle.load(folder / "bundle")
    assert bundle.dtypes == ("bfloat16",)
    assert {one["dtype"] for one in fitted["certificates"]} == {"bfloat16"}
    assert {one["source"] for one in fitted["certificates"]} == {"on-policy"}
    decoder = SafeDecoder(*plain(folder), bundle)
    assert decoder.dtype == torch.bfloat16
    assert decoder.check() <= bundle.canary.tolerance
    assert decoder.generate(["hello"], max_new_tokens=4).traces[0].header.certificate == "valid"


@pytest.mark.usefixtures("fitted")
def test_other_numbers_are_told_before_the_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    line = refused(
        "generate", "--prompt", "hello", "--model", folder / "model", "--bundle",
        folder / "bundle", "--dtype", "float32",
    )  # fmt: skip
    assert "dtype=float32 is not certified" in line and "certificates for bfloat16 alone" in line
    assert "safe-decode calibrate --dtype float32" in line


def test_calibrate_adds_certificates_of_another_format_and_keeps_the_others(
    folder, fitted, widened
):
    before, after = ProbeBundle.load(folder / "bundle"), ProbeBundle.load(folder / "both")
    assert widened["dtype"] == "float32" and widened["dtypes"] == ["bfloat16", "float32"]
    assert after.dtypes == ("bfloat16", "float32") and after.digest == widened["bundle"]
    assert after.certificates[: len(before.certificates)] == before.certificates
    assert {one["dtype"] for one in widened["certificates"]} == {"float32"}
    # bfloat16 answers are not what the float32 model says.
    assert {one["source"] for one in widened["certificates"]} == {"off-policy"}
    for options in ({}, {"dtype": torch.float32}):
        decoder = SafeDecoder(*plain(folder, **options), after)
        name = str(decoder.dtype).removeprefix("torch.")
        assert decoder.certificate == after.certificate(dtype=name)
        decoder.check()
    assert after.provenance["calibrated_again"]["bundle_before"] == fitted["bundle"]


def test_calibrating_a_format_again_replaces_its_certificates_alone(folder, widened):
    assert widened["dtypes"] == ["bfloat16", "float32"]
    found = told(
        "calibrate", "--bundle", folder / "both", "--model", folder / "model", "--data",
        folder / "rows.jsonl", "--out", folder / "again", "--max-new-tokens", 20,
    )  # fmt: skip
    both, again = (ProbeBundle.load(folder / name) for name in ("both", "again"))
    assert found["dtype"] == "bfloat16" and again.dtypes == both.dtypes
    assert again.certificate().envelope.max_new_tokens == 20
    assert again.certificate(dtype="float32") == both.certificate(dtype="float32")


@pytest.mark.usefixtures("widened")
def test_a_default_that_another_format_lacks_is_refused(folder):
    line = refused(
        "calibrate", "--bundle", folder / "both", "--model", folder / "model", "--data",
        folder / "rows.jsonl", "--out", folder / "no", "--alpha", 0.1,
    )  # fmt: skip
    assert "--alpha=0.1 comes first and becomes the default, but in float32" in line
    assert "[0.05]" in line and not (folder / "no").exists()


@pytest.mark.usefixtures("fitted")
def test_another_model_in_other_numbers_is_not_certified_as_this_one(folder):
    tiny_model("llama", seed=1).save_pretrained(folder / "other")
    byte_tokenizer().save_pretrained(folder / "other")
    line = refused(
        "calibrate", "--bundle", folder / "bundle", "--model", folder / "other", "--data",
        folder / "rows.jsonl", "--out", folder / "no",
    )  # fmt: skip
    assert "the model at hand is not the bundle's in other numbers" in line
    assert "make a bundle for this model with `safe-decode fit`" in line


@pytest.mark.usefixtures("fitted")
def test_a_bundle_without_a_canary_learns_no_further_format(folder):
    from dataclasses import replace

    replace(ProbeBundle.load(folder / "bundle"), canary=None).save(folder / "mute")
    line = refused(
        "calibrate", "--bundle", folder / "mute", "--model", folder / "model", "--data",
        folder / "rows.jsonl", "--out", folder / "no", "--dtype", "float32",
    )  # fmt: skip
    assert "dtype=float32 is refused for a bundle without a canary" in line


@pytest.mark.usefixtures("widened")
def test_people_see_which_numbers_a_certificate_speaks_of(folder):
    for command in ("inspect", "verify-certificate"):
        shown = run(command, "--bundle", folder / "both").stdout
        assert "bfloat16" in shown and "float32" in shown
    shown = run(
        "calibrate", "--bundle", folder / "bundle", "--model", folder / "model", "--data",
        folder / "rows.jsonl", "--out", folder / "shown",
    )  # fmt: skip
    assert "The bundle is certified in bfloat16." in shown.stdout


def test_a_model_without_a_template_is_told_in_one_line_before_its_weights(
    folder, tmp_path, monkeypatch
):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path / "base")
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    line = refused(
        "fit", "--data", folder / "rows.jsonl", "--model", tmp_path / "base", "--out",
        tmp_path / "no", "--alpha", 0.05,
    )  # fmt: skip
    assert "has no chat template: it is a base model" in line
