"""One step of a level as nodes of an ONNX graph.

What is computed is defined in `monitor.config`. Knows graphs. Does not know probes or bundles.
"""

from __future__ import annotations

import numpy as np

from probes.export.graph import Graph
from safe_decode.monitor.config import MonitorConfig

__all__ = ["level_nodes"]

_FLOAT = 1  # onnx.TensorProto.FLOAT


def level_nodes(graph: Graph, config: MonitorConfig) -> None:
    """Add the step from `ema` and `logits` to `next_ema`, and to `next_recent` where it is kept."""
    if config.kind == "ema":
        graph.constant("smoothing", np.asarray(config.smoothing, np.float32))
        graph.node("Sub", ["logits", "ema"], "away")
        graph.node("Mul", ["away", "smoothing"], "part_of_it")
        graph.node("Add", ["ema", "part_of_it"], "next_ema")
    elif config.kind == "mean":
        if config.window == 1:
            graph.node("Identity", ["logits"], "next_ema")
            return
        graph.node("Unsqueeze", ["logits", "axis_1"], "newest")
        graph.node("Concat", ["recent", "newest"], "window", axis=1)
        graph.node("ReduceMean", ["window", "axis_1"], "next_ema", keepdims=0)
        graph.node("Slice", ["window", "from_1", "to_end", "axis_1"], "next_recent")
    elif config.kind in ("shrunk", "bank"):
        _shrunk_nodes(graph, config)
    elif config.kind == "top":
        _best_windows_nodes(graph, config)
    else:
        forgiven = np.asarray(config.start, np.float32) + np.float32(config.drift)
        graph.constant("forgiven", forgiven.astype(np.float32))
        graph.node("Sub", ["logits", "forgiven"], "above")
        graph.node("Add", ["ema", "above"], "grown")
        graph.node("Max", ["grown", "zero"], "clamped")
        graph.node("Sub", ["logits", "logits"], "residue_of_logits")
        graph.node("Add", ["clamped", "residue_of_logits"], "next_ema")


def _shrunk_nodes(graph: Graph, config: MonitorConfig) -> None:
    graph.constant("prior", np.asarray(config.window + 1, np.int64))
    graph.node("Add", ["step", "prior"], "weighed")
    graph.node("Cast", ["weighed"], "weighed_as_float", to=_FLOAT)
    graph.node("Reciprocal", ["weighed_as_float"], "gain_of_row")
    graph.node("Unsqueeze", ["gain_of_row", "axis_1"], "gain")
    newest = "logits"
    if config.kind == "bank":
        # Gain and smoothing, each in its half of the levels: gain * is_mean + smoothing of average.
        halves = np.repeat(np.asarray([1, 0], np.float32), config.n_heads)[None]
        graph.constant("is_mean", halves)
        graph.constant("smoothings", np.float32(config.smoothing) * (1 - halves))
        graph.node("Mul", ["gain", "is_mean"], "gain_of_means")
        graph.node("Add", ["gain_of_means", "smoothings"], "gains")
        newest = graph.node("Concat", ["logits", "logits"], "logits_twice", axis=1)
    graph.node("Sub", [newest, "ema"], "away")
    graph.node("Mul", ["away", "gains" if config.kind == "bank" else "gain"], "part_of_it")
    graph.node("Add", ["ema", "part_of_it"], "next_ema")


def _best_windows_nodes(graph: Graph, config: MonitorConfig) -> None:
    graph.constant("start", np.asarray(config.start, np.float32))
    graph.constant("window_length", np.asarray(config.window, np.float32))
    graph.constant("window_steps", np.asarray(config.window, np.int64))
    graph.constant("step_0", np.asarray(0, np.int64))
    graph.constant("from_0", np.asarray([0], np.int64))
    graph.constant("last", np.asarray([-1], np.int64))
    graph.constant("best_count", np.asarray([config.best], np.int64))
    graph.constant("axes_1_2", np.asarray([1, 2], np.int64))
    graph.node("Slice", ["recent", "from_0", "last", "axis_1"], "means")
    graph.node("Slice", ["recent", "last", "to_end", "axis_1"], "sum_before")
    graph.node("Sub", ["logits", "start"], "above_start")
    graph.node("Unsqueeze", ["above_start", "axis_1"], "newest")
    graph.node("Add", ["sum_before", "newest"], "sum")
    graph.node("Div", ["sum", "window_length"], "part_above")
    graph.node("Add", ["start", "part_above"], "current")
    graph.node("Concat", ["means", "current"], "windows", axis=1)
    graph.node("TopK", ["windows", "best_count"], "best places", axis=1)
    graph.node("ReduceMean", ["best", "axis_1"], "level", keepdims=0)
    graph.node("Sub", ["logits", "logits"], "residue_of_logits")
    graph.node("Add", ["level", "residue_of_logits"], "next_ema")
    graph.node("Concat", ["means", "sum"], "going_on", axis=1)
    graph.node("Mul", ["sum", "zero"], "nothing")
    graph.node("Concat", ["best", "nothing"], "ended", axis=1)
    graph.node("Add", ["step", "one"], "steps")
    graph.node("Mod", ["steps", "window_steps"], "steps_in_window")
    graph.node("Equal", ["steps_in_window", "step_0"], "ends")
    graph.node("Unsqueeze", ["ends", "axes_1_2"], "ends_here")
    graph.node("Where", ["ends_here", "ended", "going_on"], "next_recent")
