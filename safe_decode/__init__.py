"""safe-decode: generation-time safety re-evaluation for language models.

The public names are imported when they are first used, so that `import safe_decode` is
light: it imports neither transformers nor anything that fits probes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safe_decode.bundle import ProbeBundle
    from safe_decode.errors import SafeDecodeError
    from safe_decode.events import Ended, GuardText, Released, StreamEvent, Tripped
    from safe_decode.guard import GuardedOutput, GuardHandle, SafeDecoder
    from safe_decode.monitor import MonitorConfig
    from safe_decode.policy import Policy, RequestPolicy
    from safe_decode.probe import LinearProbe
    from safe_decode.selfcheck import SelfCheck
    from safe_decode.sites import Site
    from safe_decode.stream import AsyncGuardedStream, GuardedStream
    from safe_decode.taps import ActivationTap, internal
    from safe_decode.trace import SafetyTrace, read_traces

_HOMES = {
    "ActivationTap": "taps",
    "AsyncGuardedStream": "stream",
    "Ended": "events",
    "GuardHandle": "guard",
    "GuardText": "events",
    "GuardedOutput": "guard",
    "GuardedStream": "stream",
    "LinearProbe": "probe",
    "MonitorConfig": "monitor",
    "Policy": "policy",
    "ProbeBundle": "bundle",
    "Released": "events",
    "RequestPolicy": "policy",
    "SafeDecodeError": "errors",
    "SafeDecoder": "guard",
    "SafetyTrace": "trace",
    "SelfCheck": "selfcheck",
    "Site": "sites",
    "StreamEvent": "events",
    "Tripped": "events",
    "internal": "taps",
    "read_traces": "trace",
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
    "internal",
    "read_traces",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"safe_decode.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'safe_decode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
