"""Our tap with the probe in onnxruntime instead of torch: one Gemm, one thread, no spinning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from safe_decode.activations.tap import ActivationTap
from safe_decode.bench.arms import ArmCall, called_last
from safe_decode.bench.models import Subject
from safe_decode.monitor.monitor import RiskMonitor
from safe_decode.policy.policy import Policy
from safe_decode.session.trip_detector import TripDetector

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["probed_by_onnxruntime"]


def probed_by_onnxruntime(subject: Subject) -> ArmCall:
    """Build the arm: capture by the tap, logits by onnxruntime, watched as by the guard."""
    session = _session(subject)
    tap = ActivationTap(subject.model, subject.bundle.probe.sites)

    def run(**options: Any) -> None:  # noqa: ANN401 - those of generate
        batch = options["input_ids"].shape[0]
        monitor = RiskMonitor(subject.bundle.monitor, torch.inf)
        with tap.listening() as beats, torch.no_grad():
            watch = TripDetector(monitor, Policy(), monitor.start(batch))

            def processor(_ids: Tensor, scores: Tensor) -> Tensor:
                features = beats.take()[:, -1].numpy()
                (logits,) = session.run(None, {"features": features})
                watch.step(torch.from_numpy(logits))
                watch.trips()
                return scores

            with called_last(subject.model, processor):
                subject.model.generate(**options)

    return run


def _session(subject: Subject) -> InferenceSession:
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    weight, bias = (subject.bundle.probe.tensors()[name] for name in ("weight", "bias"))
    n_features, n_heads = weight.shape
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"])],
        "probe",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["rows", n_features])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", n_heads])],
        [
            numpy_helper.from_array(np.ascontiguousarray(weight.numpy()), "weight"),
            numpy_helper.from_array(bias.numpy(), "bias"),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
