"""The kinds of probes there are, by the name that a bundle's card gives.

Knows names, layouts and where each class is. Imports no torch until a class is asked for, so
that bundles can be read without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from safe_decode.errors import ConfigurationError
from safe_decode.probe.layout import Node, ProbeLayout

if TYPE_CHECKING:
    from safe_decode.probe.interface import Probe

__all__ = ["DEFAULT_KIND", "KINDS", "layout_of", "probe_class"]

DEFAULT_KIND = "linear"
"""The kind of a bundle whose card names none: every bundle made before there were others."""

_LAYOUTS = (
    ProbeLayout(
        "linear",
        "safe_decode.probe.linear:LinearProbe",
        {"weight": ("features", "heads"), "bias": ("heads",)},
        (
            Node("MatMul", ("features", "weight"), "projected"),
            Node("Add", ("projected", "bias"), "logits"),
        ),
    ),
    ProbeLayout(
        "mlp",
        "safe_decode.probe.mlp:MLPProbe",
        {
            "hidden_weight": ("features", "hidden"),
            "hidden_bias": ("hidden",),
            "output_weight": ("hidden", "heads"),
            "output_bias": ("heads",),
        },
        (
            Node("MatMul", ("features", "hidden_weight"), "hidden_product"),
            Node("Add", ("hidden_product", "hidden_bias"), "hidden"),
            Node("Relu", ("hidden",), "rectified"),
            Node("Sub", ("hidden", "hidden"), "hidden_residue"),  # NaN where not finite, else 0
            Node("Add", ("rectified", "hidden_residue"), "activated"),
            Node("MatMul", ("activated", "output_weight"), "output_product"),
            Node("Add", ("output_product", "output_bias"), "logits"),
        ),
    ),
)
KINDS: Mapping[str, ProbeLayout] = {layout.kind: layout for layout in _LAYOUTS}


def layout_of(kind: object) -> ProbeLayout:
    """Return the layout of a kind.

    Raises:
        ConfigurationError: There is no such kind; those that there are, are named.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigurationError(
            f"kind={kind!r} is no kind of probe that this version knows, wanted one of "
            f"{sorted(KINDS)}; use the safe-decode that wrote it, or fit a probe of these kinds."
        )
    return KINDS[kind]


def probe_class(kind: object) -> type[Probe]:
    """Return the class of a kind. Raises as `layout_of`."""
    module, _, name = layout_of(kind).implementation.partition(":")
    found: type[Probe] = getattr(import_module(module), name)
    return found
