"""An option of a wrong type is refused by name before the first token, with what was wanted."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedConfig

from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.engines.transformers.option_types import require_seed, require_types
from safe_decode.errors import ConfigurationError
from safe_decode.policy.policy import RequestPolicy
from safe_decode.testing.bundles import decoder_for
from safe_decode.testing.models import EOS, byte_tokenizer, tiny_model

WRONG: dict[str, tuple[Any, str]] = {
    "generation_config": ({"max_new_tokens": 4}, "dict, wanted a transformers.GenerationConfig"),
    "generation_config of another class": (PreTrainedConfig(), "wanted a transformers.Gen"),
    "stop_strings": (5, "int, wanted a string or a list of strings"),
    "stop_strings with ids": ([1, 2], "list, wanted a string or a list of strings"),
    "stop_strings with nothing": (["a", ""], "none of them empty"),
    "seed": ("seven", "seed='seven' is of type str, wanted an integer"),
    "seed of a fraction": (1.5, "float, wanted an integer"),
    "seed of a flag": (True, "bool, wanted an integer"),
    "seed of many": ([1, "2"], "str, wanted an integer"),
    "seed too large": (2**70, "at most 64 bits"),
    "policy": ("strict", "policy holds a str, wanted a RequestPolicy or None"),
    "max_new_tokens": ("5", "max_new_tokens='5' is of type str, wanted an integer"),
    "max_new_tokens of a flag": (True, "bool, wanted an integer"),
    "temperature": ("hot", "temperature='hot' is of type str, wanted a number"),
    "do_sample": (1, "do_sample=1 is of type int, wanted True or False"),
    "top_k": (2.5, "float, wanted an integer"),
    "eos_token_id": ("</s>", "str, wanted an id or a list of ids"),
    "logits_processor": (lambda _ids, scores: scores, "function, wanted a list of callables"),
    "stopping_criteria": ([3], "list, wanted a list of callables"),
    "prefix_allowed_tokens_fn": ([1], "list, wanted a callable"),
    "streamer": (print, "wanted an object with the methods put and end"),
}


@pytest.fixture(scope="module")
def decoder() -> SafeDecoder:
    return decoder_for(tiny_model(), byte_tokenizer())


@pytest.mark.parametrize("case", WRONG)
def test_a_wrongly_typed_option_is_refused_before_the_first_token(decoder, case: str) -> None:
    (value, said), name = WRONG[case], case.split()[0]
    forwards: list[int] = []
    handle = decoder.model.register_forward_hook(lambda *_: forwards.append(1))
    # A stream is read itself, so it refuses any streamer.
    calls = (decoder.generate,) if name == "streamer" else (decoder.generate, decoder.stream)
    for call in calls:
        with pytest.raises(ConfigurationError, match=said) as caught:
            call("hello", **{name: value})
        assert name in str(caught.value)
    handle.remove()
    assert not forwards


def test_what_generate_can_read_passes(decoder) -> None:
    class Own(GenerationConfig):
        pass

    require_types({"generation_config": Own(), "stop_strings": ("a", "b"), "eos_token_id": [EOS]})
    require_types({"temperature": 1, "top_k": None, "logits_processor": [], "streamer": None})
    for seed in (None, 0, -1, 2**63, [1, None]):
        require_seed(seed)
    decoder.generate("hello", max_new_tokens=2, policy=RequestPolicy(redirect="stop"))
