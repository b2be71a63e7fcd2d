"""A bundle as ONNX graphs: the probe, and the probe with one step of its monitor.

The second graph is stateful by its signature: it takes the state of the rows and returns the
next one, under the same names with `next_` in front. Both are built node by node from the
definition in `monitor.config` and the layout of the probe's kind; nothing is traced. `parity`
holds them to torch and NumPy.

Knows graphs. Does not know models or how activations are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probes.export.graph import Graph
from probes.export.level_nodes import level_nodes
from safe_decode.activations.site import n_features
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.errors import ConfigurationError
from safe_decode.monitor.numpy_monitor import start_state
from safe_decode.probe.registry import layout_of
from safe_decode.whole_files import write_whole

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

__all__ = ["MONITOR_FILE", "PROBE_FILE", "export_onnx", "require_library"]

PROBE_FILE, MONITOR_FILE = "probe.onnx", "probe_monitor.onnx"


def export_onnx(
    bundle: ProbeBundle,
    folder: str | Path,
    *,
    alpha: float | None = None,
    tokens: int | None = None,
) -> tuple[Path, Path]:
    """Write both graphs, each whole.

    Args:
        bundle: To export.
        folder: A directory; it is created if it is not there.
        alpha: Level whose threshold stands in the graph; None for the default.
        tokens: Of an answer at most: the smallest certified cap that covers them decides; None:
            the largest.

    Returns:
        The files of the probe, and of the probe with its monitor.

    Raises:
        ConfigurationError: onnx is not installed.
        CertificateError: The level is not certified.
    """
    require_library("onnx")
    import onnx

    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    threshold = bundle.certificate(alpha, tokens=tokens).threshold
    models = {PROBE_FILE: _probe_model(bundle), MONITOR_FILE: _monitor_model(bundle, threshold)}
    for name, model in models.items():
        onnx.checker.check_model(model, full_check=True)
        write_whole(root / name, model.SerializeToString())
    return root / PROBE_FILE, root / MONITOR_FILE


def _value(name: str, kind: str, *shape: int | str) -> ValueInfoProto:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, getattr(TensorProto, kind), list(shape))


def _with_probe(bundle: ProbeBundle) -> Graph:
    graph = Graph()
    for name, tensor in bundle.probe.tensors().items():
        graph.constant(name, tensor.detach().cpu().numpy())
    for node in layout_of(bundle.probe.kind).nodes:
        graph.node(node.operator, list(node.inputs), node.output)
    return graph


def _probe_model(bundle: ProbeBundle) -> ModelProto:
    return _with_probe(bundle).model(
        bundle,
        [_value("features", "FLOAT", "batch", n_features(bundle.probe.sites))],
        [_value("logits", "FLOAT", "batch", len(bundle.probe.heads))],
        {},
    )


def _monitor_model(bundle: ProbeBundle, threshold: float) -> ModelProto:
    config = bundle.monitor
    n_heads = len(bundle.probe.heads)
    graph = _with_probe(bundle)
    scale = np.asarray(config.scale, np.float64)
    graph.constant("inverse_scale", (1 / scale).astype(np.float32))
    graph.constant("shift", (-np.asarray(config.offset) / scale).astype(np.float32))
    graph.constant("threshold", np.asarray(threshold, np.float32))
    graph.constant("low_mark", np.asarray(config.low_mark, np.float32))
    graph.constant("one", np.asarray(1, np.int64))
    graph.constant("zero", np.asarray(0, np.float32))
    graph.constant("axis_1", np.asarray([1], np.int64))
    graph.constant("from_1", np.asarray([1], np.int64))
    graph.constant("to_end", np.asarray([np.iinfo(np.int64).max], np.int64))
    state = [
        ("ema", "FLOAT", ("batch", config.n_levels)),
        ("statistic", "FLOAT", ("batch",)),
        ("step", "INT64", ("batch",)),
        ("clear_point", "INT64", ("batch",)),
        ("finite", "BOOL", ("batch",)),
    ]
    if kept := len(config.first_recent):
        state.append(("recent", "FLOAT", ("batch", kept, n_heads)))
    if config.hits > 1:
        state.append(("values", "FLOAT", ("batch", config.hits - 1)))
    level_nodes(graph, bundle.monitor)
    _decision_nodes(graph, bundle)
    outputs = [
        _value("logits", "FLOAT", "batch", n_heads),
        _value("smoothed", "FLOAT", "batch"),
        _value("alarm", "BOOL", "batch"),
    ]
    outputs += [_value(f"next_{name}", kind, *shape) for name, kind, shape in state]
    inputs = [_value("features", "FLOAT", "batch", n_features(bundle.probe.sites))]
    inputs += [_value(name, kind, *shape) for name, kind, shape in state]
    first = start_state(config, 1)
    facts = {
        "threshold": threshold,
        "start": {
            name: str(value)
            if isinstance(value := getattr(first, name)[0], np.floating)
            else value.tolist()
            for name, _, _ in state
        },
    }
    return graph.model(bundle, inputs, outputs, facts)


def _decision_nodes(graph: Graph, bundle: ProbeBundle) -> None:
    graph.node("Mul", ["next_ema", "inverse_scale"], "scaled")
    graph.node("Add", ["shift", "scaled"], "per_head")
    if bundle.monitor.boundary:
        table = np.asarray(bundle.monitor.boundary_table, np.float32)
        graph.constant("boundary", table)
        graph.constant("last_place", np.asarray(len(table) - 1, np.int64))
        graph.node("ReduceMax", ["per_head", "axis_1"], "joined", keepdims=0)
        graph.node("Min", ["step", "last_place"], "place")
        graph.node("Gather", ["boundary", "place"], "expected")
        graph.node("Sub", ["joined", "expected"], "value")
    else:
        graph.node("ReduceMax", ["per_head", "axis_1"], "value", keepdims=0)
    if bundle.monitor.hits > 1:
        graph.node("Unsqueeze", ["value", "axis_1"], "newest_value")
        graph.node("Concat", ["values", "newest_value"], "last_values", axis=1)
        graph.node("ReduceMin", ["last_values", "axis_1"], "smoothed", keepdims=0)
        graph.node("Slice", ["last_values", "from_1", "to_end", "axis_1"], "next_values")
    else:
        graph.node("Identity", ["value"], "smoothed")
    graph.node("Max", ["statistic", "smoothed"], "next_statistic")
    graph.node("Greater", ["next_statistic", "threshold"], "alarm")
    graph.node("Add", ["step", "one"], "next_step")
    graph.node("Less", ["value", "low_mark"], "is_clear")
    graph.node("Where", ["is_clear", "step", "clear_point"], "next_clear_point")
    graph.node("Sub", ["next_ema", "next_ema"], "residue")
    graph.node("ReduceSum", ["residue", "axis_1"], "residue_sum", keepdims=0)
    graph.node("Equal", ["residue_sum", "zero"], "is_sound")
    graph.node("And", ["finite", "is_sound"], "next_finite")


def require_library(library: str) -> None:
    """Check that an optional library is installed.

    Raises:
        ConfigurationError: It is not.
    """
    import importlib.util

    if importlib.util.find_spec(library) is None:
        raise ConfigurationError(
            f"{library} is not installed; install `safe-decode[onnx]` to export and compare."
        )
