"""A probe is one linear map, and refuses what it cannot judge."""

from __future__ import annotations

import pytest
import torch

from safe_decode.activations.site import Site
from safe_decode.errors import ConfigurationError
from safe_decode.probe.linear import LinearProbe

SITES = (Site(0, "mlp", (1, 3)), Site(1, "resid", (0, 2, 4)))
HEADS = ("request", "response")


def random_probe() -> LinearProbe:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 2, generator=generator)
    return LinearProbe(SITES, weight, torch.randn(2, generator=generator), HEADS)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 4, 5)])
def test_logits_are_features_times_weight_plus_bias(shape: tuple[int, ...]) -> None:
    probe, features = random_probe(), torch.randn(*shape)
    wanted = features.double() @ probe.weight.double() + probe.bias.double()
    assert probe(features).dtype == torch.float32
    torch.testing.assert_close(probe(features), wanted.float())


def test_half_precision_features_are_judged_in_float32() -> None:
    probe, features = random_probe(), torch.randn(3, 5).bfloat16()
    torch.testing.assert_close(probe(features), probe(features.float()), rtol=0, atol=0)


def test_folding_equals_explicit_standardisation() -> None:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    features, weight, bias = 30 + 5 * draw(100, 5), draw(5, 2), draw(2)
    mean, std = 30 + draw(5), 0.1 + draw(5).abs()
    folded = LinearProbe.folded(SITES, weight, bias, mean, std, HEADS)
    standardised = (features.double() - mean.double()) / std.double()
    wanted = standardised @ weight.double() + bias.double()
    torch.testing.assert_close(folded(features), wanted.float(), rtol=1e-4, atol=1e-3)


def test_nan_features_come_out_as_nan() -> None:
    features = torch.zeros(2, 5)
    features[0, 3] = torch.nan
    logits = random_probe()(features)
    assert bool(logits[0].isnan().all())
    assert bool(logits[1].isfinite().all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("field", ["weight", "bias"])
def test_weights_that_are_not_finite_are_refused(field: str, value: float) -> None:
    tensors = {"weight": torch.zeros(5, 2), "bias": torch.zeros(2)}
    tensors[field].view(-1)[1] = value
    with pytest.raises(ConfigurationError, match=f"{field} holds 1 NaN or infinite"):
        LinearProbe(SITES, tensors["weight"], tensors["bias"], HEADS)


def test_foreign_features_are_refused_by_their_number() -> None:
    with pytest.raises(ConfigurationError, match="features have 6 channels, the probe reads 5"):
        random_probe()(torch.zeros(1, 6))


def test_features_on_another_device_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="features are on meta, the probe on cpu"):
        random_probe()(torch.zeros(1, 5, device="meta"))


def test_shapes_dtypes_names_and_order_are_checked() -> None:
    weight, bias = torch.zeros(5, 2), torch.zeros(2)
    with pytest.raises(ConfigurationError, match=r"do not fit 5 features and 2 heads"):
        LinearProbe(SITES, weight.T, bias, HEADS)
    with pytest.raises(ConfigurationError, match=r"weight is torch.float64, wanted torch.float32"):
        LinearProbe(SITES, weight.double(), bias, HEADS)
    with pytest.raises(ConfigurationError, match="must be distinct names"):
        LinearProbe(SITES, weight, bias, ("a", "a"))
    with pytest.raises(ConfigurationError, match="sites are out of order"):
        LinearProbe(SITES[::-1], weight, bias, HEADS)


def test_folding_refuses_a_std_of_zero_and_wrong_shapes() -> None:
    weight, bias, ones = torch.zeros(5, 2), torch.zeros(2), torch.ones(5)
    with pytest.raises(ConfigurationError, match=r"std holds 0\.0, wanted values above 0"):
        LinearProbe.folded(SITES, weight, bias, ones, torch.zeros(5), HEADS)
    with pytest.raises(ConfigurationError, match="one value a feature"):
        LinearProbe.folded(SITES, weight, bias, ones[:1], ones, HEADS)


def test_moving_a_probe_keeps_what_it_says() -> None:
    probe, features = random_probe(), torch.randn(4, 5)
    moved = probe.to("cpu")
    assert torch.equal(moved(features), probe(features))
    assert (moved.sites, moved.heads) == (probe.sites, probe.heads)
