"""A canary passes on its own model and stops every other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from safe_decode.activations.tap import ActivationTap
from safe_decode.bundle.canary import CanaryRecord
from safe_decode.errors import CanaryError, ConfigurationError
from safe_decode.testing.models import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from tests.bundles import SITES, random_probe

TOKENIZER, PROBE = byte_tokenizer(), random_probe()


def recorded(model: PreTrainedModel) -> CanaryRecord:
    return CanaryRecord.of(
        model, TOKENIZER, PROBE, prompt="hello", response="a reply", tolerance=1e-3
    )


def test_a_canary_passes_on_the_model_it_was_recorded_on(model: PreTrainedModel) -> None:
    canary = recorded(model)
    assert canary.logits.shape == (len("a reply") + 1, 2)
    assert canary.run(model, TOKENIZER, PROBE) == 0.0


def test_the_scores_are_those_of_the_response_with_the_last_prompt_token() -> None:
    model = tiny_model()
    canary = recorded(model)
    with torch.no_grad(), ActivationTap(model, SITES).listening() as beats:
        beats.keep_last(None)
        model(torch.tensor([canary.ids]))
        everything = PROBE(beats.take()[0])
    torch.testing.assert_close(canary.logits, everything[canary.turn_start - 1 :])


def test_other_weights_are_caught() -> None:
    with pytest.raises(CanaryError, match=r"score \d of the canary differs by .* at most 0\.001"):
        recorded(tiny_model()).run(tiny_model(seed=1), TOKENIZER, PROBE)


def test_nan_is_caught() -> None:
    model = tiny_model()
    canary = recorded(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(CanaryError, match=r"score \d of the canary differs by nan"):
        canary.run(model, TOKENIZER, PROBE)


def test_another_template_is_caught() -> None:
    model = tiny_model()
    other = byte_tokenizer(chat_template=CHAT_TEMPLATE + "!")
    with pytest.raises(CanaryError, match="use the tokenizer and chat template"):
        recorded(model).run(model, other, PROBE)


def test_a_layer_that_is_skipped_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    canary = recorded(model)
    monkeypatch.setattr(model.model.layers[1], "forward", lambda hidden, **_: hidden)
    with pytest.raises(CanaryError, match="yields no scores: attn of layer 1"):
        canary.run(model, TOKENIZER, PROBE)


def test_an_impossible_record_is_refused() -> None:
    canary = recorded(tiny_model())
    with pytest.raises(ConfigurationError, match=r"wanted \[8, K\]; record the canary again"):
        replace(canary, logits=canary.logits[1:])
    with pytest.raises(ConfigurationError, match=r"tolerance=0\.0"):
        replace(canary, tolerance=0.0)
    with pytest.raises(ConfigurationError, match="must be finite"):
        replace(canary, logits=canary.logits / 0)
