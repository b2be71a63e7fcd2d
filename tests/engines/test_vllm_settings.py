"""What an operator of vLLM may set, and what is refused by name; without vLLM."""

from types import SimpleNamespace

import pytest
import torch

from safe_decode.bundle.canary import CanaryRecord
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.certificate_choice import CertificateChoice
from safe_decode.engines.vllm.checkpoint_weights import named_weights, weights_folder
from safe_decode.engines.vllm.plugin import register
from safe_decode.engines.vllm.refusals import REFUSED, require_supported
from safe_decode.engines.vllm.rows.row_terms import require_request, terms_of
from safe_decode.engines.vllm.rows.signals import SignalIds
from safe_decode.engines.vllm.settings import EngineSettings
from safe_decode.errors import (
    CertificateError,
    ConfigurationError,
    FingerprintMismatchError,
    UnsupportedError,
)
from safe_decode.testing.bundles import bundle_for, random_probe
from safe_decode.testing.models import ASSISTANT, BOS, END, EOS, USER, tiny_model


def plain(**changes):
    """A configuration that is not refused, as vLLM's defaults are."""
    config = SimpleNamespace(use_v2_model_runner=True)
    for option in REFUSED:
        *groups, name = option.path.split(".")
        place = config
        for group in groups:
            place.__dict__.setdefault(group, SimpleNamespace())
            place = getattr(place, group)
        setattr(place, name, option.allowed[-1])
    for path, value in changes.items():
        group, _, name = path.rpartition("__")
        setattr(getattr(config, group) if group else config, name, value)
    return config


@pytest.mark.parametrize("option", REFUSED, ids=lambda one: one.name)
def test_an_option_that_was_not_tested_is_refused_with_a_remedy(option):
    value = 2 if 1 in option.allowed else "something"
    with pytest.raises(UnsupportedError) as told:
        require_supported(plain(**{option.path.replace(".", "__"): value}), is_cpu=True)
    assert str(told.value) == (
        f"{option.name}={value} is refused under the guard: {option.why}; {option.remedy}."
    )


def test_defaults_are_not_refused_and_the_first_runner_is_for_cpus():
    require_supported(plain(), is_cpu=False)
    first = plain(use_v2_model_runner=False)
    require_supported(first, is_cpu=True)
    with pytest.raises(UnsupportedError, match="set VLLM_USE_V2_MODEL_RUNNER=1"):
        require_supported(first, is_cpu=False)


@pytest.fixture
def bundle(llama, tokenizer, tmp_path):
    canary = CanaryRecord.of(
        llama, tokenizer, random_probe(), prompt="Hi?", response="Ho.", tolerance=1e-3
    )
    bundle_for(llama, tokenizer, canary=canary).save(tmp_path / "bundle")
    return str(tmp_path / "bundle")


def test_settings_are_read_and_bad_ones_name_the_variable(bundle, llama, tokenizer, tmp_path):
    read = EngineSettings.read({"SAFE_DECODE_BUNDLE": bundle, "SAFE_DECODE_REDIRECT": "stop"})
    assert (read.alpha, read.redirect, read.policy.holdback_tokens) == (0.5, "stop", 0)
    for name, value, error, said in (
        ("ALPHA", "low", ConfigurationError, "SAFE_DECODE_ALPHA='low' is not a number"),
        ("ALPHA", "0.3", CertificateError, "alpha=0.3 is not certified"),
        ("REDIRECT", "warn", ConfigurationError, "is not one of"),
        ("REDIRECT", "rewind", UnsupportedError, "cannot take tokens back"),
        ("HOLDBACK_TOKENS", "4", UnsupportedError, "nothing is held back"),
    ):
        with pytest.raises(error, match=said):
            EngineSettings.read({"SAFE_DECODE_BUNDLE": bundle, f"SAFE_DECODE_{name}": value})
    bundle_for(llama, tokenizer).save(tmp_path / "without")
    with pytest.raises(UnsupportedError, match="has no canary for float32"):
        EngineSettings.read({"SAFE_DECODE_BUNDLE": str(tmp_path / "without")})
    assert read.measured_in(torch.float32).dtype == "float32"
    with pytest.raises(FingerprintMismatchError, match="dtype=bfloat16 is not certified"):
        read.measured_in(torch.bfloat16)


def params(**changes):
    return SimpleNamespace(
        extra_args=changes.pop("extra_args", None), structured_outputs=None, **changes
    )


def test_a_request_may_tighten_the_guard_and_is_told_what_else_is_refused(bundle, tokenizer):
    read = EngineSettings.read({"SAFE_DECODE_BUNDLE": bundle})
    require_request(params(logprobs=None), read)
    for asked, said in (
        (params(logprobs=0), "logprobs=0 is refused under the guard"),
        (params(prompt_logprobs=1), "prompt_logprobs=1 is refused"),
        (params(thinking_token_budget=5), "thinking_token_budget=5 is refused"),
        (params(extra_args={"safe_decode_cap": 5}), "vllm_xargs has 'safe_decode_cap', wanted"),
        (params(extra_args={"safe_decode_canary": True}), "vllm_xargs has 'safe_decode_canary'"),
        (params(extra_args={"safe_decode_alpha": 0.1}), "alpha=0.1 is not certified; pass one"),
        (params(extra_args={"safe_decode_redirect": "flag"}), "can only tighten the guard"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            require_request(asked, read)
    choice = CertificateChoice(read.bundle.certificates, "benign", "float32")
    prompt = [BOS, USER, 40, END, ASSISTANT, 41, 42]
    asked = params(extra_args={"safe_decode_cap": 7, "safe_decode_redirect": "stop"})
    terms = terms_of(prompt, asked, read, choice, tokenizer)
    assert (terms.cap, terms.watched_from, terms.policy.redirect) == (7, 4, "stop")
    asked.structured_outputs = object()
    asked.extra_args = {"safe_decode_cap": 7}
    assert terms_of(prompt, asked, read, choice, tokenizer).policy.redirect == "stop"
    raw = terms_of(list(range(40, 140)), asked, read, choice, tokenizer)
    assert raw.watched_from == 100 - 64


def test_an_engine_without_a_bundle_is_not_guarded_and_says_so(monkeypatch, caplog):
    monkeypatch.delenv("SAFE_DECODE_BUNDLE", raising=False)
    register()
    assert "SAFE_DECODE_BUNDLE is not set: this engine is not guarded" in caplog.text


def test_a_fingerprint_of_files_is_that_of_the_model(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path)
    folder = weights_folder(str(tmp_path), None)

    def of_files(dtype):
        named = named_weights(folder, is_tied=False)
        return Fingerprint.of_checkpoint(llama.config, tokenizer, named, dtype)

    assert of_files(torch.float32) == Fingerprint.of(llama, tokenizer)
    assert of_files(torch.bfloat16) == Fingerprint.of(llama.to(torch.bfloat16), tokenizer)
    tiny_model("llama", seed=1).save_pretrained(tmp_path)
    assert of_files(torch.float32) != Fingerprint.of(llama, tokenizer)


def test_signals_are_ids_that_no_text_uses_else_control_tokens(tokenizer):
    n = len(tokenizer.get_vocab())
    assert SignalIds.of(tokenizer, n + 9, [EOS]) == SignalIds(n + 8, n + 7)
    assert SignalIds.of(tokenizer, n, [EOS]) == SignalIds(0, BOS)
    with pytest.raises(UnsupportedError, match="has 0 that no text uses"):
        SignalIds.of(tokenizer, 7, range(7))
