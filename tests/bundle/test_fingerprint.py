"""A fingerprint names every difference that matters, and no other."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.errors import FingerprintMismatchError, UnsupportedError
from safe_decode.testing.models import FAMILIES, MORE_FAMILIES, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_the_same_model_has_the_same_fingerprint(family: str) -> None:
    wanted = Fingerprint.of(tiny_model(family), TOKENIZER)
    wanted.require(Fingerprint.of(tiny_model(family), byte_tokenizer()))
    assert len(wanted.weights) == 4  # three blocks and the rest


def test_saving_loading_and_calling_change_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    wanted = Fingerprint.of(model, TOKENIZER)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=5)
    loaded.generate(torch.tensor([[9]]), max_new_tokens=2, do_sample=False)
    wanted.require(Fingerprint.of(loaded, tokenizer))


def test_another_block_another_dtype_and_another_template_are_all_named() -> None:
    model = tiny_model()
    wanted = Fingerprint.of(model, TOKENIZER)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(FingerprintMismatchError, match=r"weights of model\.layers\.1 differ; load"):
        wanted.require(Fingerprint.of(model, TOKENIZER))
    other = Fingerprint.of(model.bfloat16(), byte_tokenizer(chat_template="{{ messages }}"))
    with pytest.raises(FingerprintMismatchError) as caught:
        wanted.require(other)
    assert "weights of" in str(caught.value)
    assert "dtype is 'torch.bfloat16', wanted 'torch.float32'" in str(caught.value)
    assert "template is" in str(caught.value)
    assert "config" not in str(caught.value)


def test_another_configuration_is_named_by_its_key() -> None:
    model = tiny_model()
    wanted = Fingerprint.of(model, TOKENIZER)
    model.config.rms_norm_eps = 0.5
    model.config.use_cache = False  # computes the same
    with pytest.raises(
        FingerprintMismatchError, match=r"model: config rms_norm_eps is 0\.5, wanted 1e-06; load"
    ):
        wanted.require(Fingerprint.of(model, TOKENIZER))


def test_another_vocabulary_an_adapter_and_quantisation_are_named() -> None:
    model, larger = tiny_model(), byte_tokenizer()
    wanted = Fingerprint.of(model, TOKENIZER)
    larger.add_tokens(["<extra>"])
    model.peft_config = {"poet": object()}
    model.config.quantization_config = {"quant_method": "none-such"}
    with pytest.raises(FingerprintMismatchError, match="tokenizer is .*adapters is .*quantisation"):
        wanted.require(Fingerprint.of(model, larger))


def test_a_model_without_loaded_weights_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="meta device and cannot be read"):
        Fingerprint.of(tiny_model().to("meta"), TOKENIZER)


def test_a_model_of_three_million_parameters_takes_less_than_200_ms() -> None:
    config = LlamaConfig(
        vocab_size=2_000, hidden_size=192, intermediate_size=512, num_hidden_layers=6
    )
    model = LlamaForCausalLM(config)
    best = float("inf")
    for _ in range(3):
        start = time.thread_time()
        Fingerprint.of(model, TOKENIZER)
        best = min(best, time.thread_time() - start)
    assert best < 0.2


def test_a_tokenizer_without_a_backend_is_digested_by_its_vocabulary() -> None:
    slow = SimpleNamespace(get_vocab=lambda: {"a": 0}, added_tokens_decoder={}, chat_template=None)
    wanted = Fingerprint.of(tiny_model(), slow)
    assert wanted.template == "none"
    slow.get_vocab = lambda: {"a": 1}
    with pytest.raises(FingerprintMismatchError, match="tokenizer is"):
        wanted.require(Fingerprint.of(tiny_model(), slow))
