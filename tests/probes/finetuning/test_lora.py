"""With LoRA, the merged weights of frozen units are bit-identical; the rest moves."""

import pytest
import torch

from probes.finetuning.located_freezes import RedundantUnitBudget, SafetyFreeze
from probes.finetuning.unit_weights import complement, owned_weights
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.testing.models import tiny_model
from tests.probes.finetuning.test_freeze import adamw, bits, changed, located, loop

peft = pytest.importorskip("peft")

# peft still reads a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def wrapped(model, **options):
    settings = {"r": 4, "target_modules": "all-linear", **options}
    settings["fan_in_fan_out"] = model.config.model_type == "gpt2"
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def trained(lora, freeze):
    optimizer = adamw(lora)
    with freeze.applied(lora, optimizer):
        loop(lora, optimizer, steps=4)
    return lora.merge_and_unload()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_merged_frozen_units_are_bit_identical_and_adapted_rest_moves(family):
    model = tiny_model(family)
    units = located(model)
    frozen = owned_weights(model, units.only("SCU"))
    others = complement(model, frozen)
    before, free = bits(model, frozen), bits(model, others)
    merged = trained(wrapped(model), SafetyFreeze(units))
    assert changed(before, bits(merged, frozen)) == set()
    moved = changed(free, bits(merged, others))
    matrices = {name for name in free if "weight" in name and ("attn" in name or "mlp" in name)}
    assert len(matrices & moved) >= len(matrices) // 2


def test_a_random_set_that_is_not_frozen_moves_when_merged():
    model = tiny_model("llama")
    control = owned_weights(model, located(model, seed=5).only("SCU"))
    before = bits(model, control)
    merged = trained(wrapped(model), SafetyFreeze(located(model)))
    assert changed(before, bits(merged, control)) == set(before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_budget_moves_redundant_units_alone(family):
    model = tiny_model(family)
    units = located(model)
    own = owned_weights(model, units.only("RU"), shared="all")
    rest = complement(model, own)
    before, free = bits(model, rest), bits(model, own)
    merged = trained(wrapped(model), RedundantUnitBudget(units))
    assert changed(before, bits(merged, rest)) == set()
    assert changed(free, bits(merged, own)) & {name for name in free if "weight" in name}


def test_what_cannot_be_held_is_refused_by_name():
    units = located(tiny_model("llama"))
    with pytest.raises(UnsupportedError, match="DoRA"):
        SafetyFreeze(units).frozen_weights(wrapped(tiny_model("llama"), use_dora=True))
    lora = wrapped(tiny_model("llama"))
    loop(lora, adamw(lora), steps=2)
    with pytest.raises(ConfigurationError, match="begin with a fresh adapter"):
        SafetyFreeze(units).frozen_weights(lora)
    with pytest.raises(ConfigurationError, match="begin with a fresh adapter"):
        RedundantUnitBudget(units).frozen_weights(lora)
