"""An ONNX graph in the making.

Knows nodes, constants and what a file says of its bundle. Does not know monitors.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from safe_decode.bundle.bundle import ProbeBundle

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Graph"]

_OPSET, _IR = 20, 10  # of 2024: what runtimes in use read


class Graph:
    """Collects nodes and constants of a graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a tensor under a name."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:  # noqa: ANN401 - of any kind of node
        """Add a node; names of several outputs stand with spaces between them."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, output.split(), **attributes))
        return output

    def model(
        self, bundle: ProbeBundle, inputs: list[Any], outputs: list[Any], facts: dict[str, Any]
    ) -> ModelProto:
        """Close the graph; `facts` stand in the file as JSON."""
        from onnx import helper

        graph = helper.make_graph(self.nodes, "safe-decode", inputs, outputs, self.constants)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR,
            producer_name="safe-decode",
        )
        helper.set_model_props(
            model,
            {
                "bundle": bundle.digest,
                "heads": json.dumps(bundle.probe.heads),
                "sites": json.dumps([asdict(site) for site in bundle.probe.sites]),
                **{name: json.dumps(value) for name, value in facts.items()},
            },
        )
        return model
