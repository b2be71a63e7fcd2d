"""Spans for OpenTelemetry, where it is installed; nothing otherwise.

Knows a span's name and attributes: words and counts, never text or statistics. Where spans go
is configured as OpenTelemetry has it, by its environment variables or its own launcher.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

__all__ = ["Telemetry"]


class Telemetry:
    """Writes one span a response."""

    def __init__(self) -> None:
        try:
            from opentelemetry import trace
        except ImportError:
            self._tracer = None
        else:
            self._tracer = trace.get_tracer("safe_decode.serving")

    def response(self, seconds: float, facts: Mapping[str, str | int | float]) -> None:
        """Write the span of a response that has just ended.

        Args:
            seconds: How long it took.
            facts: Its attributes.
        """
        if self._tracer is None:
            return
        now = time.time_ns()
        span = self._tracer.start_span(
            "safe_decode.response",
            start_time=now - int(seconds * 1e9),
            attributes={f"safe_decode.{name}": value for name, value in facts.items()},
        )
        span.end(now)
