"""GGUF files: dequantised they are plain models; packed, formats of their own."""

from __future__ import annotations

import pytest
import torch

from safe_decode.bundle.bundle import Fingerprint
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import ConfigurationError, FingerprintMismatchError
from safe_decode.loading import load_model
from safe_decode.testing.bundles import RESID_SITES, bundle_for, random_probe
from tests.gguf_files import LAYERS, write_gguf

PROMPTS = ["hello", "what is it?", "go"]


@pytest.fixture(scope="module", params=["lfm2", "llama"])
def file(request, tmp_path_factory):
    pytest.importorskip("accelerate", reason="GGUF files need the extra `gguf`")
    if request.param == "llama":
        pytest.importorskip("gguf", reason="transformers reads a llama by the package gguf")
    return write_gguf(tmp_path_factory.mktemp("gguf"), request.param)


@pytest.fixture(scope="module")
def packable(tmp_path_factory):
    pytest.importorskip("accelerate", reason="GGUF files need the extra `gguf`")
    return write_gguf(tmp_path_factory.mktemp("packed"), "lfm2")


def bundle_around(loaded):
    return bundle_for(loaded.model, loaded.tokenizer, probe=random_probe(sites=RESID_SITES))


@pytest.fixture
def kernel(monkeypatch):
    """Stand in for the kernel that transformers would fetch; the CPU unpacks without one."""
    kernels = pytest.importorskip(
        "transformers.integrations.gguf.kernels", reason="this transformers packs no GGUF weights"
    )
    from transformers.integrations.gguf import utils
    from transformers.quantizers import quantizer_gguf

    def multiplied(weight, x, ggml_type, out_features):
        rows = kernels.dequantize_blocks(weight, ggml_type, out_features, x.shape[1], x.dtype)
        return x @ rows.T

    monkeypatch.setattr(kernels, "get_gguf_kernel", lambda: _Kernel())
    monkeypatch.setattr(quantizer_gguf, "get_gguf_kernel", lambda: _Kernel())
    monkeypatch.setattr(utils, "mul_mat_vec", multiplied)


class _Kernel:
    def supports(self, _: int) -> bool:
        return True


def test_a_dequantised_file_is_a_plain_model_that_is_guarded(file):
    loaded = load_model(file.parent, gguf_file=file.name)
    found = Fingerprint.of(loaded.model, loaded.tokenizer)
    assert (found.number_format, found.quantisation) == ("float32", "none")
    assert len(found.weights) == LAYERS + 1
    narrow = load_model(file.parent, gguf_file=file.name, dtype="bfloat16")
    assert Fingerprint.of(narrow.model, narrow.tokenizer).number_format == "bfloat16"
    decoder = SafeDecoder(loaded.model, loaded.tokenizer, bundle_around(loaded), redirect="flag")
    output = decoder.generate(PROMPTS, max_new_tokens=6, do_sample=False)
    assert all(trace.header.certificate == "valid" for trace in output.traces)


@pytest.mark.usefixtures("kernel")
def test_a_packed_file_is_a_format_of_its_own_and_is_guarded(packable):
    plain = load_model(packable.parent, gguf_file=packable.name)
    packed = load_model(packable.parent, gguf_file=packable.name, gguf="packed")
    assert {p.dtype for p in packed.model.parameters()} == {torch.uint8, torch.float32}
    found = Fingerprint.of(packed.model, packed.tokenizer)
    assert found.number_format == "gguf-packed:Q8_0+float32"
    assert str(packable.parent) not in found.quantisation, "a file may be moved"
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(packed.model(ids).logits, plain.model(ids).logits, atol=1e-4)
    bundle = bundle_around(packed)
    assert bundle.certificate().dtype == found.number_format
    decoder = SafeDecoder(packed.model, packed.tokenizer, bundle, redirect="flag")
    output = decoder.generate(PROMPTS, max_new_tokens=6, do_sample=False)
    assert all(trace.header.certificate == "valid" for trace in output.traces)
    with pytest.raises(FingerprintMismatchError) as caught:
        SafeDecoder(plain.model, plain.tokenizer, bundle)
    assert "dtype=float32 is not certified" in str(caught.value)
    assert "--gguf-file FILE --gguf packed" in str(caught.value)


def test_packed_weights_without_a_kernel_are_refused_before_they_are_read(packable, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises(ConfigurationError, match="finds no kernel.*gguf='dequantised'"):
        load_model(packable.parent, gguf_file=packable.name, gguf="packed")


def test_what_transformers_does_not_keep_packed_is_named(tmp_path):
    file = write_gguf(tmp_path, "llama")
    with pytest.raises(ConfigurationError, match="keeps lfm2, .* packed, and this is llama; pass"):
        load_model(file.parent, gguf_file=file.name, gguf="packed")


def test_a_file_that_is_not_there_and_a_file_passed_as_the_model_are_told(file):
    with pytest.raises(ConfigurationError, match=rf"is not in .*, which holds {file.name}; pass"):
        load_model(file.parent, gguf_file="other.gguf")
    with pytest.raises(ConfigurationError, match=rf"is one file; .*gguf_file='{file.name}'"):
        load_model(file)


def test_a_missing_package_names_the_extra(file, monkeypatch):
    monkeypatch.setattr("safe_decode.checkpoint.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'safe-decode\[gguf\]'"):
        load_model(file.parent, gguf_file=file.name)


def test_a_file_that_transformers_reads_by_the_package_gguf_names_the_extra(tmp_path, monkeypatch):
    file = write_gguf(tmp_path, "llama")
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda: False)
    with pytest.raises(
        ConfigurationError, match=r"gguf>=.* with: pip install 'safe-decode\[gguf\]'"
    ):
        load_model(file.parent, gguf_file=file.name)
