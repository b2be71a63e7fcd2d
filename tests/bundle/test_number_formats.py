"""A certificate speaks of the numbers that it was measured in, and of no others."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.canary import CanaryRecord
from safe_decode.bundle.files import CARD, card_digest
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.bundle.measured import MeasuredFormat
from safe_decode.bundle.number_format import flags_for, number_format
from safe_decode.bundle.numpy_runtime import NumpyBundle
from safe_decode.certificate import Certificate
from safe_decode.demo.embedded_pair import artefact
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import (
    BundleCorruptError,
    CanaryError,
    CertificateError,
    FingerprintMismatchError,
)
from safe_decode.testing.bundles import bundle_for
from safe_decode.testing.models import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
FORMATS = {
    ("torch.float32", "none"): ("float32", "--dtype float32"),
    ("torch.bfloat16,torch.float32", "none"): ("bfloat16+float32", "--dtype bfloat16"),
    ("torch.float32,torch.uint8", '{"quant_method":"gguf","types":["Q4_K","Q6_K"]}'): (
        "gguf-packed:Q4_K,Q6_K+float32",
        "--gguf-file FILE --gguf packed --dtype float32",
    ),
    ("torch.bfloat16,torch.uint8", '{"quant_method":"bitsandbytes","_load_in_4bit":true}'): (
        "bitsandbytes-4bit+bfloat16",
        "--dtype bfloat16",
    ),
    ("torch.float16,torch.int32", '{"quant_method":"gptq","bits":4}'): (
        "gptq-4bit+float16",
        "--dtype float16",
    ),
    (
        "torch.bfloat16",
        '{"quant_method":"torchao","quant_type":{"default":{"_type":"Int8WeightOnlyConfig"}}}',
    ): ("torchao:Int8WeightOnlyConfig+bfloat16", "--dtype bfloat16"),
    ("torch.int8", '{"quant_method":"strange"}'): ("strange", "--dtype auto"),
}


@pytest.mark.parametrize(("given", "wanted"), FORMATS.items())
def test_a_format_has_one_name_and_the_options_that_load_it(given, wanted):
    name = number_format(*given)
    assert (name, flags_for(name)) == wanted


def model_in(dtype):
    return tiny_model("llama").to(dtype)


def canary_in(model, bundle):
    return CanaryRecord.of(
        model, TOKENIZER, bundle.probe, prompt="hello", response="a reply", tolerance=0.05
    )


def certificate(threshold, dtype):
    made = bundle_for(model_in(torch.float32), TOKENIZER).certificates[0]
    return Certificate.compute(
        [threshold] * 20,
        alpha=made.alpha,
        delta=made.delta,
        population="benign",
        envelope=made.envelope,
        dtype=dtype,
    )


@pytest.fixture(scope="module")
def both():
    """Certified in float32 with the threshold 5, in bfloat16 with 7."""
    wide, narrow = model_in(torch.float32), model_in(torch.bfloat16)
    bundle = bundle_for(wide, TOKENIZER, threshold=5.0)
    return replace(
        bundle,
        canary=canary_in(wide, bundle),
        certificates=(*bundle.certificates, certificate(7.0, "bfloat16")),
        further=(MeasuredFormat(Fingerprint.of(narrow, TOKENIZER), canary_in(narrow, bundle)),),
    )


def test_a_model_in_numbers_that_are_not_certified_is_refused_with_the_remedy():
    bundle = bundle_for(model_in(torch.float32), TOKENIZER)
    assert bundle.certificate().dtype == "float32" and bundle.dtypes == ("float32",)
    with pytest.raises(FingerprintMismatchError) as caught:
        SafeDecoder(model_in(torch.bfloat16), TOKENIZER, bundle)
    told = str(caught.value)
    assert "dtype=bfloat16 is not certified" in told
    assert "holds certificates for float32 alone" in told and "(--dtype float32)" in told
    assert "`safe-decode calibrate --dtype bfloat16`" in told


def test_another_model_in_other_numbers_is_called_another_model():
    bundle = bundle_for(model_in(torch.float32), TOKENIZER)
    other = byte_tokenizer(chat_template="{{ messages }}")
    with pytest.raises(FingerprintMismatchError, match="made for another model: template is"):
        SafeDecoder(model_in(torch.bfloat16), other, bundle)


def test_other_weights_in_certified_numbers_are_another_model(both):
    other = tiny_model("llama", seed=1).bfloat16()
    with pytest.raises(FingerprintMismatchError, match="made for another model: weights of"):
        SafeDecoder(other, TOKENIZER, both)


@pytest.mark.parametrize(("dtype", "threshold"), [(torch.float32, 5.0), (torch.bfloat16, 7.0)])
def test_the_certificate_in_force_is_that_of_the_models_numbers(both, dtype, threshold):
    decoder = SafeDecoder(model_in(dtype), TOKENIZER, both, redirect="flag")
    assert decoder.certificate.threshold == threshold
    assert decoder.certificate.dtype == str(dtype).removeprefix("torch.")
    assert decoder.check() <= 0.05
    output = decoder.generate(["hello"], max_new_tokens=4)
    assert output.traces[0].header.threshold == threshold
    assert output.traces[0].header.certificate == "valid"
    engine = TransformersEngine(decoder)
    assert [c.threshold for c in engine.facts.certificates.values()] == [threshold]
    engine.close()


def test_the_canary_of_one_format_is_not_that_of_another(both):
    bundle = replace(
        both, further=(replace(both.further[0], canary=replace(both.canary, tolerance=1e-6)),)
    )
    decoder = SafeDecoder(model_in(torch.bfloat16), TOKENIZER, bundle)
    with pytest.raises(CanaryError, match="of the canary differs by"):
        decoder.check()
    assert SafeDecoder(model_in(torch.float32), TOKENIZER, bundle).check() <= 0.05


def test_a_bundle_of_two_formats_comes_back_as_it_was_saved(both, tmp_path):
    both.save(tmp_path / "b")
    loaded = ProbeBundle.load(tmp_path / "b")
    assert loaded.digest == both.digest and loaded.dtypes == ("float32", "bfloat16")
    assert loaded.certificates == both.certificates
    assert loaded.further[0].fingerprint == both.further[0].fingerprint
    assert torch.equal(loaded.further[0].canary.logits, both.further[0].canary.logits)
    assert json.loads((tmp_path / "b" / CARD).read_text())["schema"] == 5
    thresholds = {
        dtype: NumpyBundle.load(tmp_path / "b", dtype=dtype).threshold
        for dtype in (None, "float32", "bfloat16")
    }
    assert thresholds == {None: 5.0, "float32": 5.0, "bfloat16": 7.0}
    with pytest.raises(CertificateError, match="is not certified for 'benign' in float16"):
        NumpyBundle.load(tmp_path / "b", dtype="float16")


def test_certificates_are_found_by_their_numbers(both):
    assert both.certificate().threshold == 5.0
    assert both.certificate(dtype="bfloat16").threshold == 7.0
    with pytest.raises(CertificateError, match="in float16, wanted one of none"):
        both.certificate(dtype="float16")


def test_a_bundle_of_one_format_is_written_as_before_it_named_them(tmp_path):
    bundle = bundle_for(model_in(torch.float32), TOKENIZER)
    bundle.save(tmp_path / "b")
    card = json.loads((tmp_path / "b" / CARD).read_text())
    assert card["schema"] == 1 and "formats" not in card
    assert "dtype" not in card["certificates"][0]


def test_the_embedded_bundle_reads_as_float32_and_keeps_its_digest():
    card = json.loads((artefact("bundle") / CARD).read_text())
    bundle = ProbeBundle.load(artefact("bundle"))
    assert bundle.digest == card["digest"]
    assert {one.dtype for one in bundle.certificates} == {"float32"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["certificates"][1].update(dtype="float16"), "dtype float16 stand beside"),
        (lambda c: c["certificates"][1].pop("dtype"), "hold one twice"),
        (lambda c: c["certificates"].pop(), "not certified for 'benign' in bfloat16"),
        (lambda c: c["formats"][0]["fingerprint"].update(template="x"), "is of another model"),
        (
            lambda c: c["formats"].append({**c["formats"][0], "canary": None}),
            "stand beside fingerprints",
        ),
        (lambda c: c.pop("formats"), "dtype bfloat16 stand beside fingerprints of float32"),
        (lambda c: c["formats"][0]["canary"].update(tolerance=9.0), "tolerance=9.0"),
    ],
)
def test_formats_that_do_not_fit_are_refused_by_name(both, tmp_path, change, told):
    both.save(tmp_path / "b")
    card = json.loads((tmp_path / "b" / CARD).read_text())
    change(card)
    card["digest"] = card_digest(card)
    (tmp_path / "b" / CARD).write_text(json.dumps(card))
    with pytest.raises(BundleCorruptError, match=told):
        ProbeBundle.load(tmp_path / "b")
