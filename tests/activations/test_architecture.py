"""What can be read is found in every family, and what cannot is refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from safe_decode.activations.architecture import anatomy_of
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.testing.models import (
    D_FF,
    D_MODEL,
    FAMILIES,
    MORE_FAMILIES,
    N_HEADS,
    N_LAYERS,
    tiny_model,
)

DEFAULT_D_FF = 4 * D_MODEL  # Falcon takes no width of its own


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_every_family_has_three_readable_kinds_of_the_width_that_flows(family: str) -> None:
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    seen: dict[tuple[int, str], int] = {}
    for layer in range(N_LAYERS):
        for kind in ("attn", "mlp"):
            anatomy.module(layer, kind).register_forward_pre_hook(
                lambda _m, args, key=(layer, kind): seen.update({key: args[0].shape[-1]})
            )
    with torch.inference_mode():
        model(torch.arange(8)[None])
    assert len(anatomy.blocks) == N_LAYERS
    assert {key: anatomy.width(*key) for key in seen} == seen
    assert len(seen) == 2 * N_LAYERS
    assert anatomy.width(0, "resid") == anatomy.d_model == D_MODEL
    assert anatomy.width(0, "mlp") == (DEFAULT_D_FF if family == "falcon" else D_FF)


@pytest.mark.parametrize(
    ("family", "head_dim", "n_kv_heads"),
    [("llama", 8, 2), ("gemma", 16, 1), ("qwen3", 16, 2), ("gpt2", 8, 4), ("falcon", 8, 1)],
)
def test_head_geometry_is_that_of_the_projection(
    family: str, head_dim: int, n_kv_heads: int
) -> None:
    anatomy = anatomy_of(tiny_model(family))
    assert (anatomy.n_heads, anatomy.head_dim) == (N_HEADS, head_dim)
    assert anatomy.n_kv_heads == n_kv_heads
    assert anatomy.width(0, "attn") == N_HEADS * head_dim


def test_gpt2_width_is_read_from_a_transposed_weight() -> None:
    anatomy = anatomy_of(tiny_model("gpt2"))
    projection = anatomy.module(0, "mlp")
    assert type(projection).__name__ == "Conv1D"
    assert anatomy.width(0, "mlp") == D_FF == projection.weight.shape[0]


def test_fused_experts_are_refused_for_mlp_and_read_as_resid() -> None:
    anatomy = anatomy_of(tiny_model("mixtral"))
    with pytest.raises(UnsupportedError, match=r"mlp of layer 1 .*experts are fused.*resid site"):
        anatomy.module(1, "mlp")
    assert anatomy.width(1, "resid") == D_MODEL
    assert anatomy.width(1, "attn") == D_MODEL


def test_unknown_layer_is_refused_with_the_range() -> None:
    with pytest.raises(ConfigurationError, match=r"layer=40 is outside this model's 0\.\.2"):
        anatomy_of(tiny_model()).module(40, "resid")


def test_model_without_config_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear has no config"):
        anatomy_of(nn.Linear(2, 2))


def test_encoder_decoder_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(is_encoder_decoder=True)  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="encoder-decoder; pass a decoder-only"):
        anatomy_of(model)


def test_model_without_a_list_of_blocks_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(  # type: ignore[assignment]
        num_hidden_layers=3, num_attention_heads=2, hidden_size=4
    )
    with pytest.raises(UnsupportedError, match="has 0 lists of 3 decoder blocks"):
        anatomy_of(model)


def test_unknown_projection_names_are_refused_by_the_names_that_were_sought() -> None:
    model = tiny_model()
    block = model.model.layers[0]
    block.mlp.renamed, block.mlp.down_proj = block.mlp.down_proj, None
    with pytest.raises(
        UnsupportedError, match="LlamaDecoderLayer has no MLP down projection: none of down_proj, "
    ):
        anatomy_of(model).module(0, "mlp")
