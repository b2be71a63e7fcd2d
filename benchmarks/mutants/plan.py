"""Which modules are mutated, and which tests are to notice.

Tests stand in the order they run: the quickest, and those that speak of the module alone, first.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PLAN", "Subject"]


@dataclass(frozen=True)
class Subject:
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


_PROXY = ("serving/test_proxy_relay.py", "serving/test_proxy.py")

PLAN = (
    Subject("certificate", ("test_certificate.py", "bundle/test_bundle.py")),
    Subject(
        "monitor.config",
        (
            "monitor/test_monitor.py",
            "policy/test_reasoning.py::test_lowered_values_follow_the_scalar_reference",
        ),
    ),  # fmt: skip  # noqa: E501
    Subject(
        "monitor.monitor",
        (
            "monitor/test_monitor.py",
            "session/test_trip_detector.py",
            "probes/calibration/test_statistic.py",
        ),
    ),
    Subject(
        "session.trip_detector", ("session/test_trip_detector.py", "engines/test_async_flag.py")
    ),
    Subject("policy.redirect", ("policy/test_redirect.py",)),
    Subject("policy.holdback", ("policy/test_holdback.py",)),
    Subject(
        "engines.transformers.loops.processor",
        ("laws/test_closed.py", "laws/test_failure_injection.py", "engines/test_processor.py"),
    ),
    Subject(
        "session.session",
        ("laws/test_state_machine.py", "laws/test_closed.py", "laws/test_failure_injection.py"),
    ),
    Subject("streaming.release", ("streaming/test_reader.py",)),
    Subject("serving.middleware.gate", ("serving/test_gate.py", "serving/test_operation.py")),
    Subject("serving.proxy.middleware", _PROXY),
    Subject("serving.proxy.requests", _PROXY),
    Subject("serving.proxy.choices", _PROXY),
    Subject("serving.proxy.fields", _PROXY),
    Subject("serving.proxy.hold", _PROXY),
    Subject("serving.proxy.anthropic_relay", _PROXY),
    Subject("serving.proxy.openai_relay", _PROXY),
    Subject("serving.proxy.whole", _PROXY),
    Subject("serving.proxy.wire", _PROXY),
)
