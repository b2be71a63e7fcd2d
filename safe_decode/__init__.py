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
    from safe_decode.engines.transformers.decoder import GuardedOutput, GuardHandle, SafeDecoder
    from safe_decode.errors import SafeDecodeError
    from safe_decode.monitor.monitor import MonitorConfig
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
    "Ended": "streaming.events",
    "GuardHandle": "engines.transformers.decoder",
    "GuardText": "streaming.events",
    "GuardedOutput": "engines.transformers.decoder",
    "GuardedStream": "streaming.reader",
    "LinearProbe": "probe.linear",
    "MonitorConfig": "monitor.monitor",
    "Policy": "policy.policy",
    "Probe": "probe.interface",
    "ProbeBundle": "bundle.bundle",
    "Released": "streaming.events",
    "RequestPolicy": "policy.policy",
    "SafeDecodeError": "errors",
    "SafeDecoder": "engines.transformers.decoder",
    "SafetyTrace": "trace.schema",
    "SelfCheck": "policy.self_check",
    "Site": "activations.site",
    "StreamEvent": "streaming.events",
    "Tripped": "streaming.events",
    "unwatched": "activations.tap",
    "read_traces": "trace.schema",
}

__all__ = [
    "ActivationTap",
    "AsyncGuardedStream",
    "Ended",
    "GuardHandle",
    "GuardText",
    "GuardedOutput",
    "GuardedStream",
    "LinearProbe",
    "MonitorConfig",
    "Policy",
    "Probe",
    "ProbeBundle",
    "Released",
    "RequestPolicy",
    "SafeDecodeError",
    "SafeDecoder",
    "SafetyTrace",
    "SelfCheck",
    "Site",
    "StreamEvent",
    "Tripped",
    "unwatched",
    "read_traces",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"safe_decode.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'safe_decode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
