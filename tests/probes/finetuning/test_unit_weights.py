"""A unit owns exactly the weights whose gradient vanishes without it, in every family."""

import numpy as np
import pytest
import torch
from torch import nn

from probes.finetuning.unit_weights import complement, owned_weights
from probes.location.units import UnitSet
from safe_decode.activations.architecture import anatomy_of
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.testing.models import D_FF, FAMILIES, MORE_FAMILIES, N_HEADS, N_LAYERS, tiny_model

FALCON_GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
MODELS = [(family, {}) for family in (*FAMILIES, *MORE_FAMILIES)]
MODELS += [("falcon", {"multi_query": False}), ("falcon", FALCON_GROUPED)]


def units_of(model, *, heads=(), neurons=()):
    """Units given as (layer, index)."""
    places = [(layer, 0, index) for layer, index in heads]
    places += [(layer, 1, index) for layer, index in neurons]
    layer, kind, index = np.asarray(places).reshape(-1, 3).T
    zeros = np.zeros(len(places), dtype=np.float32)
    return UnitSet(
        layer=layer.astype(np.int32),
        kind=kind.astype(np.uint8),
        index=index.astype(np.int32),
        i_s=zeros,
        i_u=zeros,
        head_dim=anatomy_of(model).head_dim,
        category=np.ones(len(places), dtype=np.uint8),
    )


def gradients(model, without=None):
    """The gradient of every parameter, with the channels of some units taken out."""
    model.zero_grad()
    anatomy, handles = anatomy_of(model), []
    for layer, kind, index in without or ():
        size = anatomy.head_dim if kind == "attn" else 1

        def zeroed(_module, args, begin=index * size, end=(index + 1) * size):
            hidden = args[0].clone()
            hidden[..., begin:end] = 0
            return (hidden,)

        handles.append(anatomy.module(layer, kind).register_forward_pre_hook(zeroed))
    ids = torch.arange(7, 39).reshape(2, 16)
    weight = torch.linspace(-1, 1, 16 * 263).reshape(16, 263)
    (model(ids).logits.double() * weight).sum().backward()
    for handle in handles:
        handle.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def flags(model, slices):
    """One boolean an entry of every parameter: is it in the slices."""
    found = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for part in slices:
        if part.indices is None:
            found[part.name][...] = True
        else:
            found[part.name].index_fill_(part.dim, part.indices, True)
    return found


def assert_owned(model, units, removed):
    owned = flags(model, owned_weights(model, units, shared="all"))
    before, after = gradients(model), gradients(model, removed)
    assert any(bool(mask.any()) for mask in owned.values())
    for name, grad in before.items():
        assert not bool(after[name][owned[name]].any()), name
        # What already had no gradient, such as an unread embedding, proves nothing.
        alive = grad.abs() > 1e-3 * grad.abs().max()
        # A norm before an attention of one group has none left when the group is gone.
        mistaken = alive & ~owned[name] & (after[name] == 0) & ("norm" not in name)
        assert not bool(mistaken.any()), (name, torch.nonzero(mistaken)[:3])


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_a_unit_owns_what_has_no_gradient_without_it(family, changes):
    model = tiny_model(family, **changes)
    assert_owned(model, units_of(model, neurons=[(1, 7)]), [(1, "mlp", 7)])
    per_group = N_HEADS // anatomy_of(model).n_kv_heads
    group = [(1, head) for head in range(N_HEADS - per_group, N_HEADS)]
    removed = [(layer, "attn", head) for layer, head in group]
    assert_owned(model, units_of(model, heads=group), removed)
    if per_group > 1:  # one head of a group: its key and value rows serve its neighbours on
        assert_owned(model, units_of(model, heads=[(1, 1)]), [(1, "attn", 1)])


def test_shared_rows_are_owned_by_any_or_by_all_of_their_heads():
    model = tiny_model("llama")  # heads 0, 1 share one key-value head and 2, 3 the other
    size = anatomy_of(model).head_dim

    def key_rows(heads, shared):
        units = units_of(model, heads=[(0, head) for head in heads])
        slices = {part.name: part for part in owned_weights(model, units, shared=shared)}
        part = slices.get("model.layers.0.self_attn.k_proj.weight")
        return [] if part is None else part.indices.tolist()

    assert key_rows([0], "all") == []
    assert key_rows([0], "any") == list(range(size))
    assert key_rows([0, 1], "all") == list(range(size))
    assert key_rows([1, 2], "any") == list(range(2 * size))
    assert key_rows([1, 2], "all") == []


def test_all_units_own_both_matrices_and_nothing_else(model):
    every = units_of(
        model,
        heads=[(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)],
        neurons=[(layer, j) for layer in range(N_LAYERS) for j in range(D_FF)],
    )
    owned = flags(model, owned_weights(model, every))
    layers = [name for name in owned if any(f".{n}." in name for n in range(N_LAYERS))]
    for name, mask in owned.items():
        assert bool(mask.all()) == bool(mask.any()), name
        is_matrix_of_layer = name in layers and dict(model.named_parameters())[name].ndim == 2
        assert bool(mask.all()) or not is_matrix_of_layer, name


def test_the_complement_is_the_rest(model):
    units = units_of(model, heads=[(0, 1), (2, 3)], neurons=[(1, 0), (1, 63)])
    slices = owned_weights(model, units)
    mine, rest = flags(model, slices), flags(model, complement(model, slices))
    for name in mine:
        assert bool((mine[name] ^ rest[name]).all()), name
    parameters = dict(model.named_parameters())
    counted = sum(part.count(parameters[part.name]) for part in slices)
    assert counted == sum(int(mask.sum()) for mask in mine.values())


@pytest.mark.parametrize(
    ("units", "told"),
    [
        ({"heads": [(9, 0)]}, "layer=9 is outside"),
        ({"heads": [(0, N_HEADS)]}, f"attn unit {N_HEADS} of layer 0"),
        ({"neurons": [(0, D_FF)]}, f"mlp unit {D_FF} of layer 0"),
    ],
)
def test_units_of_another_model_are_refused(llama, units, told):
    with pytest.raises(ConfigurationError, match=told):
        owned_weights(llama, units_of(llama, **units))


def test_heads_of_another_size_are_refused(llama):
    units = units_of(tiny_model("gemma"), heads=[(0, 0)])
    with pytest.raises(ConfigurationError, match="head_dim=16, this model has 0..3 there and"):
        owned_weights(llama, units)


def test_adapters_are_refused_by_name(llama):
    projection = llama.get_decoder().layers[0].mlp.down_proj
    projection.lora_A = nn.Linear(D_FF, 2)
    with pytest.raises(UnsupportedError, match=r"layers.0.mlp.down_proj carries an adapter"):
        owned_weights(llama, units_of(llama, heads=[(0, 0)]))


def test_a_matrix_of_unknown_use_is_refused(llama):
    llama.get_decoder().layers[1].self_attn.router = nn.Linear(3, 3)
    with pytest.raises(UnsupportedError, match="layer 1 holds router.weight"):
        owned_weights(llama, units_of(llama, heads=[(1, 0)]))


def test_quantised_weights_are_refused(llama):
    weight = torch.zeros(3, dtype=torch.int8)
    llama.quantised = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UnsupportedError, match="quantised is of torch.int8"):
        owned_weights(llama, units_of(llama, heads=[(1, 0)]))
