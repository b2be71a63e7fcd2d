"""safe-decode: generation-time safety re-evaluation for language models.

The public names are imported when they are first used, so that `import safe_decode` is
light: it imports neither transformers nor anything that fits probes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safe_decode.activations.site import Site
    from safe_decode.activations.tap import ActivationTap, unwatched
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.bundle.numpy_runtime import NumpyBundle
    from safe_decode.certificate import Certificate
    from safe_decode.demo.embedded_pair import embedded as load_embedded
    from safe_decode.engines.transformers.decoder import GuardedOutput, GuardHandle, SafeDecoder
    from safe_decode.errors import SafeDecodeError
    from safe_decode.fetching.bundle_places import load_bundle
    from safe_decode.loading import load_model
    from safe_decode.monitor.config import MonitorConfig
    from safe_decode.monitor.monitor import RiskMonitor
    from safe_decode.policy.policy import Policy, RequestPolicy
    from safe_decode.policy.self_check import SelfCheck
    from safe_decode.probe.interface import Probe
    from safe_decode.probe.linear import LinearProbe
    from safe_decode.streaming.events import Ended, GuardText, Released, StreamEvent, Tripped
    from safe_decode.streaming.reader import AsyncGuardedStream, GuardedStream
    from safe_decode.trace.schema import SafetyTrace, read_traces

_HOMES = {
    "ActivationTap": "activations.tap",
    "AsyncGuardedStream": "streaming.reader",
    "Certificate": "certificate",
    "Ended": "streaming.events",
    "GuardHandle": "engines.transformers.decoder",
    "GuardText": "streaming.events",
    "GuardedOutput": "engines.transformers.decoder",
    "GuardedStream": "streaming.reader",
    "LinearProbe": "probe.linear",
    "MonitorConfig": "monitor.config",
    "NumpyBundle": "bundle.numpy_runtime",
    "Policy": "policy.policy",
    "Probe": "probe.interface",
    "ProbeBundle": "bundle.bundle",
    "Released": "streaming.events",
    "RequestPolicy": "policy.policy",
    "RiskMonitor": "monitor.monitor",
    "SafeDecodeError": "errors",
    "SafeDecoder": "engines.transformers.decoder",
    "SafetyTrace": "trace.schema",
    "SelfCheck": "policy.self_check",
    "Site": "activations.site",
    "StreamEvent": "streaming.events",
    "Tripped": "streaming.events",
    "load_bundle": "fetching.bundle_places",
    "load_embedded": "demo.embedded_pair",
    "load_model": "loading",
    "read_traces": "trace.schema",
    "unwatched": "activations.tap",
}
_OWN_NAMES = {"load_embedded": "embedded"}
"""What a public name is called in its module, where that differs."""

__all__ = [
    "ActivationTap",
    "AsyncGuardedStream",
    "Certificate",
    "Ended",
    "GuardHandle",
    "GuardText",
    "GuardedOutput",
    "GuardedStream",
    "LinearProbe",
    "MonitorConfig",
    "NumpyBundle",
    "Policy",
    "Probe",
    "ProbeBundle",
    "Released",
    "RequestPolicy",
    "RiskMonitor",
    "SafeDecodeError",
    "SafeDecoder",
    "SafetyTrace",
    "SelfCheck",
    "Site",
    "StreamEvent",
    "Tripped",
    "load_bundle",
    "load_embedded",
    "load_model",
    "read_traces",
    "unwatched",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("safe-decode")
    if name in _HOMES:
        home = importlib.import_module(f"safe_decode.{_HOMES[name]}")
        return getattr(home, _OWN_NAMES.get(name, name))
    raise AttributeError(f"module 'safe_decode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
