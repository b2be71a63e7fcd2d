"""Torch, NumPy and onnxruntime over the same random steps: do they decide alike?

Knows how states are compared. Does not know how a graph is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from probes.export.onnx import MONITOR_FILE, require_library
from safe_decode.activations.site import n_features
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.monitor.monitor import MonitorState, RiskMonitor
from safe_decode.monitor.numpy_monitor import NumpyMonitorState, start_state, step_state
from safe_decode.probe.registry import layout_of

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["ParityReport", "agreement"]

_SAMPLE = 1_000  # rows from which the spread of the logits is taken
_RESTART = 1 / 200  # a row of the comparison ends about so often, as responses do


@dataclass(frozen=True)
class ParityReport:
    """Largest differences found, relative where a value is above 1.

    Attributes:
        steps: Random steps of each row.
        batch: Rows.
        onnx_torch: Between onnxruntime and torch.
        onnx_numpy: Between onnxruntime and NumPy.
        torch_numpy: Between torch and NumPy.
        flags_differ: Rows and steps where alarm, step or finiteness differ though the statistic
            does not lie within the tolerance of the threshold.
    """

    steps: int
    batch: int
    onnx_torch: float
    onnx_numpy: float
    torch_numpy: float
    flags_differ: int

    @property
    def largest(self) -> float:
        """The largest of the three differences."""
        return max(self.onnx_torch, self.onnx_numpy, self.torch_numpy)


def agreement(
    bundle: ProbeBundle,
    folder: str | Path,
    *,
    alpha: float | None = None,
    tokens: int | None = None,
    steps: int = 10_000,
    batch: int = 4,
    seed: int = 0,
    tolerance: float = 1e-5,
) -> ParityReport:
    """Run onnxruntime, torch and NumPy over the same random features and compare every step.

    Args:
        bundle: The one exported.
        folder: Where its graphs are.
        alpha: As exported.
        tokens: As exported.
        steps: Of each row.
        batch: Rows; each begins anew at random, all three together.
        seed: Of the features.
        tolerance: Within which a value may lie on either side of a mark.

    Raises:
        ConfigurationError: onnxruntime is not installed.
    """
    require_library("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(Path(folder) / MONITOR_FILE), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    config, probe = bundle.monitor, bundle.probe.to("cpu")
    threshold = bundle.certificate(alpha, tokens=tokens).threshold
    monitor, rng = RiskMonitor(config, threshold), np.random.default_rng(seed)
    layout, tensors = layout_of(probe.kind), {k: v.numpy() for k, v in probe.tensors().items()}
    width = n_features(probe.sites)
    sample = layout.logits(tensors, rng.normal(size=(_SAMPLE, width)))
    spread = sample.std(axis=0).max()  # logits of about unit spread, once divided by it
    onnx_state = numpy_state = begun = start_state(config, batch)
    torch_state = begun_torch = monitor.start(batch)
    largest, flags = np.zeros(3), 0
    for _ in range(steps):
        features = (rng.normal(size=(batch, width)) / spread).astype(np.float32)
        found = dict(
            zip(names, session.run(None, _feeds(session, features, onnx_state)), strict=True)
        )
        onnx_state = NumpyMonitorState(**_state(found, onnx_state))
        numpy_state = step_state(config, threshold, numpy_state, layout.logits(tensors, features))
        torch_state = monitor.step(torch_state, probe(torch.from_numpy(features)))
        as_arrays = NumpyMonitorState(*(field.numpy() for field in torch_state))
        pairs = ((onnx_state, as_arrays), (onnx_state, numpy_state), (as_arrays, numpy_state))
        largest = np.maximum(largest, [_difference(a, b) for a, b in pairs])
        flags += sum(_flags_differ(a, b, threshold, tolerance) for a, b in pairs)
        again = rng.random(batch) < _RESTART
        onnx_state, numpy_state = (_restarted(s, begun, again) for s in (onnx_state, numpy_state))
        torch_state = _restarted_torch(torch_state, begun_torch, again)
    onnx_torch, onnx_numpy, torch_numpy = (float(value) for value in largest)
    return ParityReport(steps, batch, onnx_torch, onnx_numpy, torch_numpy, flags)


def _restarted_torch(
    state: MonitorState, begun: MonitorState, again: NDArray[np.bool_]
) -> MonitorState:
    """Begin the rows anew that are marked in `again` [batch]."""
    mask = torch.from_numpy(again)
    return type(state)(
        *(
            torch.where(mask.view(-1, *(1,) * (old.ndim - 1)), new, old)
            for new, old in zip(begun, state, strict=True)
        )
    )


def _feeds(
    session: InferenceSession, features: NDArray[Any], state: NumpyMonitorState
) -> dict[str, Any]:
    wanted = {entry.name for entry in session.get_inputs()}
    return {"features": features} | {k: v for k, v in state._asdict().items() if k in wanted}


def _state(found: dict[str, Any], before: NumpyMonitorState) -> dict[str, Any]:
    """Take the next state; what the graph does not keep stays empty."""
    return {
        name: found.get(f"next_{name}", found.get(name, value))
        for name, value in before._asdict().items()
    }


def _difference(a: NumpyMonitorState, b: NumpyMonitorState) -> float:
    worst = 0.0
    for name in ("ema", "smoothed", "statistic"):
        one, other = getattr(a, name), getattr(b, name)
        worst = max(worst, float((np.abs(one - other) / np.maximum(np.abs(other), 1)).max()))
    return worst


def _flags_differ(
    a: NumpyMonitorState, b: NumpyMonitorState, threshold: float, tolerance: float
) -> int:
    near = np.abs(b.statistic - threshold) <= tolerance * max(abs(threshold), 1)
    differ = ((a.alarm != b.alarm) & ~near) | (a.step != b.step) | (a.finite != b.finite)
    return int(differ.sum())


def _restarted(
    state: NumpyMonitorState, begun: NumpyMonitorState, again: NDArray[Any]
) -> NumpyMonitorState:
    fields: dict[str, Any] = {}
    for name, old in state._asdict().items():
        rows = again.reshape(-1, *(1,) * (old.ndim - 1))
        fields[name] = np.where(rows, getattr(begun, name), old)
    return NumpyMonitorState(**fields)
