"""The MLP probe: its arithmetic, and that it hides nothing that is not finite."""

from __future__ import annotations

import pytest
import torch

from safe_decode.activations.site import Site
from safe_decode.errors import ConfigurationError
from safe_decode.probe.mlp import MLPProbe
from safe_decode.probe.registry import layout_of

SITES = (Site(0, "mlp", (1, 3)), Site(1, "resid", (0, 2, 4)))
HEADS = ("request", "response")


def tensors(hidden: int = 6, n_heads: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"features": 5, "hidden": hidden, "heads": n_heads}
    return {
        name: torch.randn([sizes[one] for one in shape], generator=generator)
        for name, shape in layout_of("mlp").shapes.items()
    }


def random_mlp(**sizes: int) -> MLPProbe:
    return MLPProbe.from_tensors(SITES, tensors(**sizes), HEADS[: sizes.get("n_heads", 2)])


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 4, 5)])
def test_logits_are_those_of_one_rectified_layer(shape):
    probe, features, own = random_mlp(), torch.randn(*shape), tensors()
    own = {name: tensor.double() for name, tensor in own.items()}
    hidden = torch.relu(features.double() @ own["hidden_weight"] + own["hidden_bias"])
    wanted = hidden @ own["output_weight"] + own["output_bias"]
    torch.testing.assert_close(probe(features), wanted.float(), rtol=1e-5, atol=1e-5)


def test_the_numpy_arithmetic_is_that_of_torch():
    probe, features = random_mlp(), torch.randn(7, 5)
    arrays = {name: tensor.numpy() for name, tensor in probe.tensors().items()}
    found = torch.from_numpy(layout_of("mlp").logits(arrays, features.numpy()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, probe(features), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_unit_hides_a_feature_that_is_not_finite(value):
    # Every unit turns it to minus infinity or to 0 times infinity; ReLU alone would say 0.
    own = tensors()
    own["hidden_weight"][3] = -1.0 if value > 0 else 1.0
    probe = MLPProbe.from_tensors(SITES, own, HEADS)
    features = torch.zeros(2, 5)
    features[0, 3] = value
    arrays = {name: tensor.numpy() for name, tensor in own.items()}
    with_numpy = torch.from_numpy(layout_of("mlp").logits(arrays, features.numpy()))
    for logits in (probe(features), with_numpy):
        assert logits.isfinite().all(dim=1).tolist() == [False, True]


def test_folding_equals_explicit_standardisation():
    generator = torch.Generator().manual_seed(1)
    features = 30 + 5 * torch.randn(100, 5, generator=generator)
    mean, std = 30 + torch.randn(5, generator=generator), torch.linspace(0.5, 2, 5)
    folded = MLPProbe.folded(SITES, tensors(), mean, std, HEADS)
    wanted = random_mlp()((features - mean) / std)
    torch.testing.assert_close(folded(features), wanted, rtol=1e-4, atol=1e-3)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ConfigurationError, match=r"hidden_bias \(5,\).* do not fit 5 features"):
        MLPProbe.from_tensors(SITES, {**tensors(), "hidden_bias": torch.zeros(5)}, HEADS)
    bad = {**tensors(), "output_bias": torch.tensor([0.0, torch.nan])}
    with pytest.raises(ConfigurationError, match="output_bias holds 1 NaN"):
        MLPProbe.from_tensors(SITES, bad, HEADS)
    with pytest.raises(ConfigurationError, match="features have 6 channels, the probe reads 5"):
        random_mlp()(torch.zeros(1, 6))
    with pytest.raises(ConfigurationError, match="sites are out of order"):
        MLPProbe.from_tensors(SITES[::-1], tensors(), HEADS)


def test_gradients_flow_to_the_features():
    features = torch.randn(2, 5, requires_grad=True)
    random_mlp()(features).sum().backward()
    assert bool((features.grad != 0).any())
