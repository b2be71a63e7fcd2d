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


_PROXY = ("test_proxy_relay.py", "test_serving_proxy.py")

PLAN = (
    Subject("certificate", ("test_certificate.py", "test_bundle.py")),
    Subject(
        "monitor_config",
        ("test_monitor.py", "test_spans.py::test_lowered_values_follow_the_scalar_reference"),
    ),  # fmt: skip  # noqa: E501
    Subject("monitor", ("test_monitor.py", "test_watch.py", "test_statistic.py")),
    Subject("watch", ("test_watch.py", "test_late.py")),
    Subject("redirect", ("test_redirect.py",)),
    Subject("holdback", ("test_holdback.py",)),
    Subject("processor", ("test_closed.py", "test_failure_injection.py", "test_processor.py")),
    Subject("session", ("test_state_machine.py", "test_closed.py", "test_failure_injection.py")),
    Subject("release", ("test_stream.py",)),
    Subject("serving.gate", ("test_serving_gate.py", "test_serving_operation.py")),
    Subject("serving.middleware", _PROXY),
    Subject("serving.proxy.asks", _PROXY),
    Subject("serving.proxy.choices", _PROXY),
    Subject("serving.proxy.fields", _PROXY),
    Subject("serving.proxy.hold", _PROXY),
    Subject("serving.proxy.messages", _PROXY),
    Subject("serving.proxy.relay", _PROXY),
    Subject("serving.proxy.whole", _PROXY),
    Subject("serving.proxy.wire", _PROXY),
)
