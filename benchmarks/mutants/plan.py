"""Which modules are mutated, and which tests are to notice.

Tests stand in the order they run: the quickest, and those that speak of the module alone, first.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PLAN", "MutatedModule"]


@dataclass(frozen=True)
class MutatedModule:
    """One module.

    Attributes:
        module: Dotted, below `safe_decode`.
        tests: Files below `tests`, or files with `::` and a test.
    """

    module: str
    tests: tuple[str, ...]

    @property
    def path(self) -> str:
        """Where it lies, from the root of the project."""
        return f"safe_decode/{self.module.replace('.', '/')}.py"


_LOOPS = (
    "laws/test_closed.py",
    "laws/test_failure_injection.py",
    "engines/test_processor.py",
)
_SESSION = (
    "session/test_update.py",
    "laws/test_state_machine.py",
    "laws/test_closed.py",
    "laws/test_failure_injection.py",
)
_PROXY = ("serving/test_proxy_relay.py", "serving/test_proxy.py")

PLAN = (
    MutatedModule("certificate", ("test_certificate.py", "bundle/test_bundle.py")),
    MutatedModule(
        "monitor.config",
        (
            "monitor/test_monitor.py",
            "policy/test_reasoning.py::test_lowered_values_follow_the_scalar_reference",
        ),
    ),  # fmt: skip  # noqa: E501
    MutatedModule(
        "monitor.monitor",
        (
            "monitor/test_monitor.py",
            "session/test_trip_detector.py",
            "probes/calibration/test_statistic.py",
        ),
    ),
    MutatedModule(
        "session.trip_detector", ("session/test_trip_detector.py", "engines/test_waits.py")
    ),
    MutatedModule("policy.redirect", ("policy/test_redirect.py", "policy/test_policy.py")),
    MutatedModule("policy.holdback", ("policy/test_holdback.py", "streaming/test_release.py")),
    MutatedModule("engines.transformers.loops.processor", _LOOPS),
    MutatedModule("engines.transformers.loops.external_steps", _LOOPS),
    MutatedModule("session.session", _SESSION),
    MutatedModule("session.trip_log", _SESSION),
    MutatedModule("session.history", _SESSION),
    MutatedModule("session.forward_reader", _SESSION),
    MutatedModule("session.batch_update", ("session/test_update.py",)),
    MutatedModule(
        "streaming.attempt_text", ("streaming/test_release.py", "streaming/test_reader.py")
    ),
    MutatedModule("streaming.release", ("streaming/test_release.py", "streaming/test_reader.py")),
    MutatedModule("serving.middleware.gate", ("serving/test_gate.py", "serving/test_operation.py")),
    MutatedModule("serving.proxy.middleware", _PROXY),
    MutatedModule("serving.proxy.requests", _PROXY),
    MutatedModule("serving.proxy.choices", _PROXY),
    MutatedModule("serving.proxy.fields", _PROXY),
    MutatedModule("serving.proxy.hold", _PROXY),
    MutatedModule("serving.proxy.anthropic_relay", _PROXY),
    MutatedModule("serving.proxy.openai_relay", _PROXY),
    MutatedModule("serving.proxy.whole", _PROXY),
    MutatedModule("serving.proxy.wire", _PROXY),
)
