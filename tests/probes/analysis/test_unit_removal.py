"""Removed units are silent while the block runs, and nothing is left of it afterwards."""

import numpy as np
import pytest
import torch

from probes.analysis.unit_removal import removed
from probes.data.conversations import Conversation
from probes.location.locate import channel_moments
from probes.location.units import UnitSet
from safe_decode.activations.architecture import anatomy_of
from safe_decode.errors import ConfigurationError
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.probes.finetuning.test_freeze import located

IDS = torch.arange(10, 40).reshape(2, 15)


def scores(model):
    with torch.inference_mode():
        return model(IDS).logits


def columns_silenced(model, units):
    """The same by hand: the columns of B set to zero."""
    anatomy = anatomy_of(model)
    for layer, kind, index in zip(units.layer, units.kind, units.index, strict=True):
        reader = anatomy.module(int(layer), "mlp" if kind else "attn")
        size = 1 if kind else units.head_dim
        weight = reader.weight.data
        weight = weight.T if type(reader).__name__ != "Conv1D" else weight
        weight[int(index) * size : (int(index) + 1) * size] = 0


def test_zero_removal_is_that_of_the_column_and_leaves_every_bit(model):
    units = located(model).only("SCU")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = scores(model)
    with removed(model, units):
        without = scores(model)
    assert not torch.allclose(whole, without)
    assert torch.equal(whole, scores(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8)), name
    columns_silenced(model, units)
    torch.testing.assert_close(scores(model), without, rtol=1e-4, atol=1e-4)


def test_mean_removal_keeps_what_a_unit_says_on_average(llama):
    tokenizer = byte_tokenizer()
    said = [
        Conversation(
            messages=({"role": "user", "content": f"{n} stones"},), response="a boat", group=str(n)
        )
        for n in range(6)
    ]
    means = channel_moments(llama, tokenizer, said)
    units = located(llama).only("SCU", "CU", "UCU", "RU")
    units = units.take(np.flatnonzero((units.layer == 1) & (units.kind == 1)))
    seen = []
    reader = anatomy_of(llama).module(1, "mlp")
    with removed(llama, units, fill="mean", means=means):
        handle = reader.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        scores(llama)
        handle.remove()
    mean = next(m.mean for m in means if (m.layer, m.kind) == (1, "mlp"))
    wanted = torch.from_numpy(mean).float().expand_as(seen[0])
    torch.testing.assert_close(seen[0], wanted)


def test_hooks_are_gone_after_an_exception(llama):
    whole = scores(llama)
    with pytest.raises(RuntimeError, match="on purpose"), removed(llama, located(llama)):
        raise RuntimeError("on purpose")
    assert torch.equal(whole, scores(llama))


def test_units_of_another_model_and_a_fill_without_means_are_refused(llama):
    units = located(llama)
    with (
        pytest.raises(ConfigurationError, match="pass units located on it"),
        removed(tiny_model("llama", intermediate_size=16), units),
    ):
        pass
    with (
        pytest.raises(ConfigurationError, match="means hold nothing"),
        removed(llama, units, fill="mean"),
    ):
        pass
    with pytest.raises(ConfigurationError, match="fill='half'"), removed(llama, units, fill="half"):
        pass


def test_no_units_remove_nothing(llama):
    units = located(llama)
    assert isinstance(units, UnitSet)
    whole = scores(llama)
    with removed(llama, units.only("SCU").take(np.zeros(0, dtype=np.intp))):
        assert torch.equal(whole, scores(llama))
