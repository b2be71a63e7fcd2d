"""A model that has changed since it was wrapped is refused by name, whatever the way in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import safe_decode.bundle.seal
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import FingerprintMismatchError, UnsupportedError
from safe_decode.prompts.batch import from_prompts
from safe_decode.testing.bundles import decoder_for
from safe_decode.testing.models import CHAT_TEMPLATE, byte_tokenizer, tiny_model

SHORT: dict[str, Any] = {"max_new_tokens": 2}


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **changes)


def first(model: Any) -> Any:
    return model.model.layers[1].mlp.down_proj


def train_one_step(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def write(model: Any, how: Callable[[torch.Tensor], object]) -> None:
    with torch.no_grad():
        how(first(model).weight)


def reload(model: Any) -> None:
    model.load_state_dict(tiny_model(seed=1).state_dict())


def replace_parameter(model: Any) -> None:
    first(model).weight = nn.Parameter(first(model).weight.detach() * 2)


def replace_module(model: Any) -> None:
    model.model.layers[1] = tiny_model(seed=1).model.layers[1]


def wrap_in_peft(model: Any) -> None:
    get_peft_model(model, lora()).eval()


def add_adapter(model: Any) -> None:
    model.add_adapter(lora(), adapter_name="poet")
    model.eval()


def merge(model: Any) -> None:
    get_peft_model(model, lora()).eval().merge_and_unload()


def and_back(model: Any) -> None:
    model.bfloat16()
    model.float()  # what was rounded stays so


MODEL_CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "bf16": (lambda m: m.to(torch.bfloat16), "dtype is 'torch.bfloat16', wanted 'torch.float32'"),
    "half": (lambda m: m.half(), "dtype is 'torch.float16'"),
    "bf16 and back": (and_back, "weights of"),
    "data.zero_": (lambda m: first(m).weight.data.zero_(), r"weights of model\.layers\.1 differ"),
    "data.mul_": (lambda m: first(m).weight.data.mul_(1.01), r"weights of model\.layers\.1"),
    "data =": (lambda m: setattr(first(m).weight, "data", first(m).weight * 2), "weights of"),
    "zero_": (lambda m: write(m, torch.Tensor.zero_), r"weights of model\.layers\.1 differ"),
    "copy_": (lambda m: write(m, lambda w: w.copy_(w * 2)), r"weights of model\.layers\.1"),
    "optimizer step": (train_one_step, "weights of"),
    "load_state_dict": (reload, "weights of"),
    "parameter replaced": (replace_parameter, r"weights of model\.layers\.1 differ"),
    "module replaced": (replace_module, r"weights of model\.layers\.1 differ"),
    "resized embeddings": (lambda m: m.resize_token_embeddings(300), "vocab_size is 300"),
    "peft": (wrap_in_peft, r"adapters is \('default',\)"),
    "add_adapter": (add_adapter, r"adapters is \('poet',\)"),
    "merged adapter": (merge, "weights of"),
    "configuration": (lambda m: setattr(m.config, "rms_norm_eps", 0.5), "rms_norm_eps is 0.5"),
    "nested configuration": (
        lambda m: m.config.rope_parameters.update(rope_theta=5.0),
        "config rope_parameters is",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of adapters put beside others
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_a_model_that_changes_after_wrapping_is_refused_by_name(name: str) -> None:
    change, said = MODEL_CHANGES[name]
    model, tokenizer = tiny_model(), byte_tokenizer()
    decoder = decoder_for(model, tokenizer)
    decoder.require_unchanged()
    change(model)
    for _ in range(2):  # and so it stays
        with pytest.raises(FingerprintMismatchError, match=f"changed since it was wrapped.*{said}"):
            decoder.generate("hello", **SHORT)


def use_another_template(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [(use_another_template, "template is"), (lambda t: t.add_tokens(["<x>"]), "tokenizer is")],
    ids=["template", "vocabulary"],
)
def test_a_tokenizer_that_changes_after_wrapping_is_refused_by_name(change, said) -> None:
    tokenizer = byte_tokenizer()
    decoder = decoder_for(tiny_model(), tokenizer)
    change(tokenizer)
    with pytest.raises(FingerprintMismatchError, match=said):
        decoder.generate("hello", **SHORT)


ADAPTER_CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "another one active": (lambda m: m.set_adapter("second"), "first .not active."),
    "disabled": (lambda m: m.disable_adapters(), r"first \(not active\)"),
    "scaled": (
        lambda m: [layer.set_scale("first", 9.0) for layer in tuned(m)],
        "adapters are active=.*scaling=.*were active",
    ),
    "merged": (lambda m: [layer.merge() for layer in tuned(m)], "weights of .*merged"),
    "hot swap": (
        lambda m: [layer.lora_A["first"].weight.data.mul_(3.0) for layer in tuned(m)],
        "weights of",
    ),
}


def tuned(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(type(module), "_active_adapter")]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of adapters put beside others
@pytest.mark.parametrize("name", ADAPTER_CHANGES)
def test_adapters_that_change_after_wrapping_are_refused_by_name(name: str) -> None:
    change, said = ADAPTER_CHANGES[name]
    model = tiny_model()
    model.add_adapter(lora(), adapter_name="second")
    model.add_adapter(lora(), adapter_name="first")
    model.set_adapter("first")
    decoder = decoder_for(model.eval(), byte_tokenizer())
    decoder.generate("hello", **SHORT)
    change(model.eval())
    with pytest.raises(FingerprintMismatchError, match=said):
        decoder.generate("hello", **SHORT)


@pytest.mark.parametrize("part", ["model", "model.layers.1.mlp"])
def test_training_mode_of_any_module_is_refused(part: str) -> None:
    model = tiny_model()
    decoder = decoder_for(model, byte_tokenizer())
    model.get_submodule(part).train()
    with pytest.raises(UnsupportedError, match=rf"training=True.*module '?{part}"):
        decoder.generate("hello", **SHORT)
    with pytest.raises(UnsupportedError, match=r"call model\.eval\(\) first"):
        decoder_for(model, byte_tokenizer())
    model.eval()
    decoder.generate("hello", **SHORT)


def test_a_buffer_that_is_saved_with_the_model_counts() -> None:
    model = tiny_model()
    model.register_buffer("packed", torch.arange(8.0))
    model.register_buffer("computed", torch.arange(8.0), persistent=False)
    decoder = decoder_for(model, byte_tokenizer())
    model.computed.zero_()
    decoder.require_unchanged()
    model.packed.zero_()
    with pytest.raises(FingerprintMismatchError, match="values of buffers differ"):
        decoder.require_unchanged()


def ways_in(decoder: SafeDecoder) -> dict[str, Callable[[], object]]:
    tokenizer, device = decoder.tokenizer, decoder.model.device
    ids = from_prompts(tokenizer, "hello", None, device).input_ids
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    async def read() -> None:
        decoder.astream("hello", **SHORT)

    return {
        "generate": lambda: decoder.generate("hello", **SHORT),
        "stream": lambda: decoder.stream("hello", **SHORT),
        "astream": lambda: __import__("asyncio").run(read()),
        "processor": lambda: decoder.processor(ids).__enter__(),
        "score": lambda: decoder.score([talk]),
    }


@pytest.mark.parametrize("way", ["generate", "stream", "astream", "processor", "score"])
def test_no_way_into_the_model_leads_around_the_check(way: str) -> None:
    model = tiny_model()
    decoder = decoder_for(model, byte_tokenizer())
    first(model).weight.data.zero_()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(FingerprintMismatchError):
        ways_in(decoder)[way]()
    assert not calls


def test_what_moves_and_is_the_same_passes_and_is_looked_at_once(monkeypatch) -> None:
    taken: list[int] = []

    class Counted(safe_decode.bundle.seal.Fingerprint):
        @classmethod
        def of(cls, *args: Any) -> Any:
            taken.append(1)
            return safe_decode.bundle.fingerprint.Fingerprint.of(*args)

    model, tokenizer = tiny_model(), byte_tokenizer()
    decoder = decoder_for(model, tokenizer)
    monkeypatch.setattr(safe_decode.bundle.seal, "Fingerprint", Counted)
    for _ in range(2):
        decoder.generate("hello", **SHORT)
    assert not taken
    writes = first(model).weight._version
    write(model, lambda w: w.mul_(1.0))
    assert first(model).weight._version > writes
    first(model).weight.data = first(model).weight.data.clone()
    tokenizer.chat_template = copy.copy(tokenizer.chat_template)
    for _ in range(2):
        decoder.generate("hello", **SHORT)
    assert len(taken) == 1


def test_a_change_that_is_taken_back_is_no_change() -> None:
    model = tiny_model()
    decoder = decoder_for(model, byte_tokenizer())
    before = first(model).weight.detach().clone()
    first(model).weight.data.zero_()
    with pytest.raises(FingerprintMismatchError):
        decoder.generate("hello", **SHORT)
    first(model).weight.data.copy_(before)
    decoder.generate("hello", **SHORT)


def test_generation_and_the_guard_s_own_taps_move_no_sign(monkeypatch) -> None:
    model = tiny_model()
    decoder = decoder_for(model, byte_tokenizer(), threshold=-1e9, redirect="rewind")
    monkeypatch.setattr(safe_decode.bundle.seal, "Fingerprint", None)  # would be called
    decoder.generate("hello", max_new_tokens=8)
    decoder.generate("hello", max_new_tokens=8, cache_implementation="static")
    with decoder.installed():
        decoder.generate("hello", max_new_tokens=8)
    decoder.generate("hello", max_new_tokens=8, num_beams=2)


def test_another_device_is_refused() -> None:
    model = tiny_model()
    decoder = decoder_for(model, byte_tokenizer())
    seal = decoder._seal
    moved = safe_decode.bundle.seal._State(("cuda:0",), seal._state.adapters, seal._state.buffers)
    assert safe_decode.bundle.seal._state_differences(seal._state, moved) == [
        "parameters are on cuda:0, were on cpu"
    ]


def test_the_server_refuses_a_changed_model_and_closes_its_rows() -> None:
    from safe_decode.engines.rows import Row, RowPolicy, RowRequest, Sampling
    from safe_decode.engines.transformers.batch.engine import TransformersEngine
    from safe_decode.streaming.events import Finished

    model, events = tiny_model(), []
    engine = TransformersEngine(decoder_for(model, byte_tokenizer()))
    request = RowRequest(
        engine.chat([{"role": "user", "content": "hi"}]),
        Sampling(max_tokens=4, seed=0),
        RowPolicy(0.5, "refuse", 2),
    )
    first(model).weight.data.zero_()
    with pytest.raises(FingerprintMismatchError):
        engine.check()
    engine.run([Row(request, events.append)])
    assert isinstance(events[-1], Finished) and events[-1].outcome == "closed"
    assert "FingerprintMismatchError" in str(events[-1].error)
    engine.close()
