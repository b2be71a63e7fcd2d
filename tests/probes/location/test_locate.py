"""Location equals the paper's definition, computed by brute force on several families."""

import dataclasses

import numpy as np
import pytest
import torch

from probes.activations.teacher_forcing import encode_response
from probes.data.conversations import Conversation
from probes.location.importance import score_units
from probes.location.locate import LocateConfig, all_unit_sites, channel_moments, locate
from probes.location.units import Ratios, sites_of
from safe_decode.activations.architecture import anatomy_of
from safe_decode.errors import DataError, UnsupportedError
from safe_decode.testing.models import D_FF, N_HEADS, N_LAYERS, tiny_model


def conversations(n=9, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Conversation(
            messages=({"role": "user", "content": "p" * int(rng.integers(1, 20))},),
            response=f"response {row}",
            group=str(row),
            response_ids=tuple(int(i) for i in rng.integers(10, 250, size=5 + row)),
        )
        for row in range(n)
    ]


def brute_force(model, tokenizer, rows, module):
    """Inputs of one module over lone forwards, at the positions before response tokens."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    collected = []
    for row in rows:
        encoded = encode_response(tokenizer, row)
        with torch.no_grad():
            model(torch.tensor([encoded.ids]))
        collected.append(seen.pop()[0, encoded.turn_start - 1 : -1].double().numpy())
    handle.remove()
    inputs = np.concatenate(collected)
    weight = module.weight.detach().double().numpy()
    columns = weight.T if type(module).__name__ == "Conv1D" else weight
    assert columns.shape[1] == inputs.shape[1]
    variance = ((inputs - inputs.mean(0)) ** 2).sum(0) / (len(inputs) - 1)
    return variance * (columns**2).sum(0), len(inputs)


def test_importance_equals_brute_force(model, tokenizer):
    rows = conversations()
    found = channel_moments(model, tokenizer, rows, tokens_per_batch=100)
    anatomy = anatomy_of(model)
    assert [(m.layer, m.kind) for m in found] == [
        (layer, kind) for layer in range(N_LAYERS) for kind in ("attn", "mlp")
    ]
    for moments in found:
        module = anatomy.module(moments.layer, moments.kind)
        expected, positions = brute_force(model, tokenizer, rows, module)
        assert moments.positions == positions
        np.testing.assert_allclose(moments.importance(), expected, rtol=1e-3)


def test_every_head_and_neuron_is_one_unit(model, tokenizer):
    units = locate(
        model, tokenizer, conversations(), conversations(seed=1), LocateConfig(min_refusals=9)
    )
    assert int((units.kind == 0).sum()) == N_LAYERS * N_HEADS
    assert int((units.kind == 1).sum()) == N_LAYERS * D_FF
    assert sites_of(units) == all_unit_sites(model)
    assert units.provenance["distinct_refusals"] == 9
    assert units.provenance["safety_positions"] == sum(5 + row for row in range(9))


def test_located_scores_are_those_of_the_two_data_sets(llama, tokenizer):
    safety, utility = conversations(), conversations(seed=1)
    config = LocateConfig(min_refusals=1, ratios=Ratios(safety=0.1))
    units = locate(llama, tokenizer, safety, utility, config)
    scores = score_units(
        channel_moments(llama, tokenizer, safety),
        channel_moments(llama, tokenizer, utility),
        head_dim=anatomy_of(llama).head_dim,
    )
    np.testing.assert_allclose(units.i_s, scores.i_s, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(units.i_u, scores.i_u, rtol=1e-4, atol=1e-5)
    assert units.counts()["SCU"] == round(0.1 * len(units))


def test_a_unit_that_only_moves_on_refusals_is_safety_critical(llama, tokenizer):
    # Neuron 7 of layer 1 is made loud while refusals run and quiet while benign text does.
    rng = np.random.default_rng(0)

    def rows(low, high):
        return [
            Conversation(
                messages=({"role": "user", "content": "p"},),
                response=f"{low} {row}",
                group=str(row),
                response_ids=tuple(int(i) for i in rng.integers(low, high, size=12)),
            )
            for row in range(60)
        ]

    mlp = llama.get_decoder().layers[1].mlp

    def planted(loud):
        def hook(_module, args):
            hidden = args[0].clone()
            hidden[..., 7] = hidden[..., 7] * 0.01 + 50 * loud * torch.randn(hidden.shape[:-1])
            return (hidden,)

        return mlp.down_proj.register_forward_pre_hook(hook)

    torch.manual_seed(0)
    moments = []
    for loud, bounds in ((1.0, (200, 250)), (0.0, (10, 100))):
        handle = planted(loud)
        moments.append(channel_moments(llama, tokenizer, rows(*bounds)))
        handle.remove()
    scores = score_units(*moments, head_dim=anatomy_of(llama).head_dim)
    best = int(np.argmax(scores.i_s - scores.i_u))
    assert (scores.layer[best], scores.kind[best], scores.index[best]) == (1, 1, 7)


def test_too_few_distinct_refusals_are_refused(llama, tokenizer):
    same = [conversations()[0]] * 80
    with pytest.raises(DataError, match="holds 1 distinct responses, wanted at least 50"):
        locate(llama, tokenizer, same, conversations())


def test_fused_experts_are_refused_with_the_reason(tokenizer):
    with pytest.raises(UnsupportedError, match="mlp of layer 0 cannot be read"):
        channel_moments(tiny_model("mixtral"), tokenizer, conversations())


def test_units_of_a_model_with_heads_of_several_sizes_or_none_are_refused(monkeypatch, llama):
    for found in (0, 8):
        anatomy = dataclasses.replace(anatomy_of(llama), head_dim=found)
        monkeypatch.setattr("probes.location.locate.anatomy_of", lambda _, a=anatomy: a)
        if found:
            assert len(all_unit_sites(llama)) == 2 * N_LAYERS
        else:
            with pytest.raises(UnsupportedError, match="no attention heads, or heads of several"):
                all_unit_sites(llama)
