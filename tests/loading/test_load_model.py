"""Models load in their own numbers, and wrong starts are told before the weights are read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from importlib import util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safe_decode.bundle.bundle import Fingerprint
from safe_decode.checkpoint import look_at
from safe_decode.demo.embedded_pair import artefact
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import ConfigurationError
from safe_decode.loading import LoadSettings, load_model, plain_dtype
from safe_decode.testing.bundles import bundle_for
from safe_decode.testing.models import byte_tokenizer, tiny_model

# Of peft.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def saved(
    folder: Path, *, dtype: torch.dtype = torch.float32, template: bool = True, **shape: int
) -> Path:
    tiny_model("llama", **shape).to(dtype).save_pretrained(folder)
    tokenizer = byte_tokenizer() if template else byte_tokenizer(chat_template=None)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Fail where weights are read."""

    def read(*_: object, **__: object) -> None:
        pytest.fail("the weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_loads_in_the_dtype_of_its_checkpoint_as_plain_from_pretrained_does(
    tmp_path, dtype
):
    folder = saved(tmp_path / "m", dtype=dtype)
    loaded, plain = load_model(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.model.dtype == plain.dtype == dtype
    assert plain_dtype(folder, LoadSettings()) == str(dtype).removeprefix("torch.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    Fingerprint.of(loaded.model, loaded.tokenizer).require(Fingerprint.of(plain, tokenizer))
    assert not loaded.model.training
    named = load_model(folder, dtype="float32")
    assert named.model.dtype == torch.float32
    assert plain_dtype(folder, LoadSettings(dtype="float32")) == "float32"


@pytest.mark.parametrize("name", ["aligned", "unaligned"])
def test_the_embedded_pair_says_that_it_is_float32(name):
    assert load_model(artefact(name)).model.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(artefact(name)).dtype == torch.float32


@pytest.mark.usefixtures("no_weights")
def test_a_directory_without_weights_is_told_before_they_are_read(tmp_path):
    folder = saved(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"holds no weights .* but .*config\.json.*fetch"):
        load_model(folder)


@pytest.mark.usefixtures("no_weights")
def test_a_directory_without_a_configuration_is_told_with_what_it_holds(tmp_path):
    folder = saved(tmp_path / "m")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"holds no config\.json, but .*save_pretrained"):
        load_model(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigurationError, match=r"holds no config\.json, but nothing"):
        load_model(empty)
    (empty / "x-Q4.gguf").touch()
    with pytest.raises(ConfigurationError, match=r"pass gguf_file='x-Q4\.gguf' \(--gguf-file\)"):
        load_model(empty)


@pytest.mark.usefixtures("no_weights")
def test_a_path_that_is_not_there_and_a_broken_configuration_are_told(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be loaded: there is no such directory"):
        load_model(tmp_path / "nowhere")
    folder = saved(tmp_path / "m")
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"config\.json is not JSON"):
        load_model(folder)


@pytest.mark.usefixtures("no_weights")
def test_a_model_without_a_chat_template_is_told_before_its_weights_where_one_is_needed(tmp_path):
    folder = saved(tmp_path / "m", template=False)
    with pytest.raises(ConfigurationError, match=r"has no chat template: it is a base model.*ins"):
        load_model(folder, needs_template=True)


def test_a_model_without_a_chat_template_loads_for_whoever_passes_ids(tmp_path):
    folder = saved(tmp_path / "m", template=False)
    assert load_model(folder).tokenizer.chat_template is None


@pytest.mark.usefixtures("no_weights")
def test_a_tokenizer_that_is_missing_is_told_before_the_weights(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load_model(tmp_path / "m")


@pytest.mark.usefixtures("no_weights")
def test_a_device_that_is_not_there_is_told_before_the_weights(tmp_path):
    device = "cuda:99"
    with pytest.raises(ConfigurationError, match="on device='cuda:99'"):
        load_model(saved(tmp_path / "m"), device=device)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("method", "install"), [("torchao", "pip install torchao"), ("awq", "pip install gptqmodel")]
)
def test_a_quantised_model_whose_package_is_missing_names_it(
    tmp_path, monkeypatch, method, install
):
    folder = saved(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("safe_decode.checkpoint.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=f"quantised by {method}, .*{install}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"dtype": "float8"}, r"dtype='float8' is not one of \('auto', 'float32'"),
        ({"gguf": "half"}, "gguf='half' is not one of"),
        ({"gguf": "packed"}, "gguf='packed' needs gguf_file"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(tmp_path, wrong, told):
    with pytest.raises(ConfigurationError, match=told):
        load_model(tmp_path, **wrong)


def test_looking_at_a_directory_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from safe_decode.checkpoint import look_at\n"
        f"look_at({str(saved(tmp_path / 'm'))!r})\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base, and an adapter that moves it, saved without a tokenizer."""
    peft = pytest.importorskip("peft", reason="adapters need the extra `adapters`")
    root = tmp_path_factory.mktemp("adapter")
    base = saved(root / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        peft.get_peft_model(model, config).save_pretrained(root / "adapter")
    return root


def test_an_adapters_directory_is_its_base_with_the_adapter_live(adapter):
    ids = torch.arange(5, 15)[None]
    base, loaded = load_model(adapter / "base"), load_model(adapter / "adapter")
    with torch.no_grad():
        moved = loaded.model(ids).logits - base.model(ids).logits
    assert moved.abs().max() > 1e-3
    found = Fingerprint.of(loaded.model, loaded.tokenizer)
    assert found.adapters == ("default",) and found.number_format == "float32"
    plain = AutoModelForCausalLM.from_pretrained(adapter / "adapter").eval()
    found.require(Fingerprint.of(plain, AutoTokenizer.from_pretrained(adapter / "base")))


def test_an_adapters_own_tokenizer_goes_before_that_of_its_base(adapter):
    assert load_model(adapter / "adapter").tokenizer.chat_template is not None
    own = byte_tokenizer(chat_template="{{ messages }}")
    own.save_pretrained(adapter / "adapter")
    try:
        assert load_model(adapter / "adapter").tokenizer.chat_template == "{{ messages }}"
    finally:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (adapter / "adapter" / file).unlink(missing_ok=True)


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_whose_base_or_package_is_missing_says_which(adapter, tmp_path, monkeypatch):
    lost = tmp_path / "lost"
    lost.mkdir()
    for file in (adapter / "adapter").iterdir():
        (lost / file.name).write_bytes(file.read_bytes())
    config = json.loads((lost / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (lost / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=r"is an adapter on '.*gone'.*Mend base_model"):
        load_model(lost)
    (lost / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"and no adapter_model\.safetensors"):
        load_model(lost)
    monkeypatch.setattr("safe_decode.checkpoint.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'safe-decode\[adapters\]'"):
        load_model(adapter / "adapter")


def test_a_merged_adapter_is_a_plain_checkpoint(adapter, tmp_path):
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(adapter / "base")
    merged = PeftModel.from_pretrained(model, adapter / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    assert not look_at(tmp_path / "merged").is_adapter
    loaded = load_model(tmp_path / "merged")
    assert Fingerprint.of(loaded.model, loaded.tokenizer).adapters == ()


def require_guarded(loaded):
    bundle = bundle_for(loaded.model, loaded.tokenizer)
    decoder = SafeDecoder(loaded.model, loaded.tokenizer, bundle, redirect="flag")
    decoder.generate(["hello"], max_new_tokens=4, do_sample=False)
    # Again: some methods pack weights anew at the first forward.
    (trace,) = decoder.generate(["hello"], max_new_tokens=4, do_sample=False).traces
    assert trace.header.certificate == "valid" and trace.end.error is None
    assert all(math.isfinite(step.statistic) for step in trace.steps)


@pytest.mark.skipif(util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_torchao_checkpoint_has_a_format_of_its_own_and_keeps_its_fingerprint(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    base = saved(tmp_path / "base")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model.save_pretrained(tmp_path / "int8")
    byte_tokenizer().save_pretrained(tmp_path / "int8")
    first, again = load_model(tmp_path / "int8"), load_model(tmp_path / "int8")
    found = Fingerprint.of(first.model, first.tokenizer)
    assert found.number_format == "torchao:Int8WeightOnlyConfig+float32"
    found.require(Fingerprint.of(again.model, again.tokenizer))
    require_guarded(first)


@pytest.mark.skipif(util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitsandbytes_checkpoint_has_a_format_of_its_own_and_is_guarded(tmp_path, bits):
    from transformers import BitsAndBytesConfig

    base = saved(tmp_path / "base", hidden_size=64)  # a block of bitsandbytes has 64 values
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model.save_pretrained(tmp_path / "narrow")
    byte_tokenizer().save_pretrained(tmp_path / "narrow")
    loaded = load_model(tmp_path / "narrow")
    found = Fingerprint.of(loaded.model, loaded.tokenizer)
    assert found.number_format.startswith(f"bitsandbytes-{bits}bit+")
    require_guarded(loaded)
