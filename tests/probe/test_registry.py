"""Kinds of probes are found by name, described by data, and refused where they do not fit."""

from __future__ import annotations

import json
from typing import ClassVar

import numpy as np
import pytest
import torch

from safe_decode.activations.site import Site
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.files import CARD
from safe_decode.bundle.numpy_runtime import NumpyBundle
from safe_decode.errors import BundleCorruptError, ConfigurationError
from safe_decode.probe.interface import Probe
from safe_decode.probe.layout import Node, ProbeLayout
from safe_decode.probe.linear import LinearProbe
from safe_decode.probe.registry import KINDS, layout_of, probe_class
from tests.bundle.test_bundle import forge
from tests.bundles import random_bundle, random_probe

SITES = (Site(0, "resid", (0, 1, 2)),)


class PlainProbe(Probe):
    """What a kind must write, and nothing of what is optional."""

    kind: ClassVar[str] = "plain"

    def __init__(self, inner: LinearProbe) -> None:
        self.inner, self.sites, self.heads = inner, inner.sites, inner.heads

    def __call__(self, features):
        return self.inner(features)

    def tensors(self):
        return self.inner.tensors()

    @classmethod
    def from_tensors(cls, sites, tensors, heads):
        return cls(LinearProbe.from_tensors(sites, tensors, heads))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_is_found_under_its_own_name(kind):
    assert probe_class(kind).kind == layout_of(kind).kind == kind
    assert not {"canary", "features"} & set(layout_of(kind).shapes)


def test_a_kind_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ConfigurationError, match=r"kind='cubic' is no kind.* wanted one of \['lin"):
        probe_class("cubic")
    with pytest.raises(ConfigurationError, match="kind=3 is no kind"):
        layout_of(3)


def test_a_kind_that_does_not_write_how_it_moves_is_moved():
    probe = PlainProbe(random_probe())
    features = torch.randn(3, 7)
    assert torch.equal(probe.to("cpu")(features), probe(features))


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"a": (3, 4), "b": (4, 2)}, None),
        ({"a": (3, 4), "b": (5, 2)}, r"a \(3, 4\) and b \(5, 2\) do not fit 3 features and 2"),
        ({"a": (3,), "b": (4, 2)}, r"a \(3,\) and b"),
        ({"a": (2, 4), "b": (4, 2)}, r"pass a \(3, 4\) and b \(4, 2\)"),
        ({"a": (3, 0), "b": (0, 2)}, r"pass a \(3, 1\)"),
        ({"a": (), "b": ()}, "do not fit"),
        ({"a": (3, 4)}, r"has the tensors \['a', 'b'\], got \['a'\]"),
        ({"a": (3, 4), "b": (4, 2), "c": ()}, "pass each of them once"),
    ],
)
def test_shapes_are_checked_and_a_free_dimension_is_one_size(found, named):
    nodes = (Node("MatMul", ("features", "a"), "x"), Node("MatMul", ("x", "b"), "logits"))
    shapes = {"a": ("features", "inner"), "b": ("inner", "heads")}
    layout = ProbeLayout("two", "none:None", shapes, nodes)
    if named is None:
        layout.require_shapes(found, n_features=3, n_heads=2)
        return
    with pytest.raises(ConfigurationError, match=named):
        layout.require_shapes(found, n_features=3, n_heads=2)


@pytest.mark.parametrize(
    "nodes",
    [
        (),
        (Node("MatMul", ("features", "a"), "other"),),
        (Node("Erase", ("features", "a"), "logits"),),
        (Node("MatMul", ("features", "b"), "logits"),),
        (Node("MatMul", ("features", "a"), "a"), Node("Add", ("a", "a"), "logits")),
    ],
)
def test_arithmetic_that_does_not_go_through_is_refused(nodes):
    with pytest.raises(ConfigurationError, match="of the kind 'one'|last node"):
        ProbeLayout("one", "none:None", {"a": ("features", "heads")}, nodes)


def test_the_arithmetic_of_a_layout_is_that_of_the_class():
    probe = random_probe()
    tensors = {name: tensor.numpy() for name, tensor in probe.tensors().items()}
    features = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    found = layout_of(probe.kind).logits(tensors, features)
    np.testing.assert_allclose(found, probe(torch.from_numpy(features)).numpy(), rtol=1e-5)


def test_the_card_of_a_linear_probe_is_as_before_there_were_kinds(llama, tokenizer, tmp_path):
    random_bundle(llama, tokenizer).save(tmp_path / "b")
    card = json.loads((tmp_path / "b" / CARD).read_text())
    assert "probe" not in card and card["schema"] == 1


@pytest.mark.parametrize("load", [ProbeBundle.load, NumpyBundle.load])
def test_a_bundle_of_an_unknown_kind_is_refused_by_name(llama, tokenizer, tmp_path, load):
    random_bundle(llama, tokenizer).save(tmp_path / "b")
    forge(tmp_path / "b", card=lambda c: c.update(probe={"kind": "cubic", "tensors": {}}))
    with pytest.raises(BundleCorruptError, match=r"kind='cubic' .* wanted one of \['linear'"):
        load(tmp_path / "b")


@pytest.mark.parametrize("load", [ProbeBundle.load, NumpyBundle.load])
def test_tensors_other_than_the_card_records_are_refused(llama, tokenizer, tmp_path, load):
    random_bundle(llama, tokenizer).save(tmp_path / "b")
    shapes = {"weight": [7, 3], "bias": [2]}
    forge(tmp_path / "b", card=lambda c: c.update(probe={"kind": "linear", "tensors": shapes}))
    with pytest.raises(BundleCorruptError, match=r"records the tensors .*\[7, 3\].* file holds"):
        load(tmp_path / "b")
