"""What operators count: requests, trips, delays, queues, times. Prometheus's text format.

Knows names and labels. Does not know texts, statistics or who asks. One registry a server, so
that two servers in one process do not mix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from safe_decode.engines.interface import StepTimes

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEP_SECONDS = tuple(scale * 10.0**power for power in range(-5, 0) for scale in (1, 2.5, 5))
_TOKENS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._add_counts(self.registry)
        self._add_state(self.registry)
        self._add_times(self.registry)

    def _add_counts(self, own: CollectorRegistry) -> None:
        """Count requests, rows, tokens, trips and what is refused."""
        self.requests = Counter(
            "safe_decode_requests", "Requests answered.", ["endpoint", "status"], registry=own
        )
        self.rows = Counter(
            "safe_decode_rows", "Responses ended.", ["endpoint", "finish_reason"], registry=own
        )
        self.trips = Counter(
            "safe_decode_trips",
            "Responses that tripped, by what became of them and what the probe reads for.",
            ["action", "category"],
            registry=own,
        )
        self.shadow_rows = Counter(
            "safe_decode_shadow_rows",
            "Responses whose trips are told and not acted upon.",
            ["endpoint"],
            registry=own,
        )
        self.would_block = Counter(
            "safe_decode_would_block",
            "Of them, those that would have tripped, by what they would have become.",
            ["endpoint", "action", "category"],
            registry=own,
        )
        self.failures = Counter(
            "safe_decode_guard_failures",
            "Rows closed since the guard or engine failed.",
            registry=own,
        )
        self.refused = Counter("safe_decode_refused", "Requests not taken.", ["why"], registry=own)
        self.tokens = Counter("safe_decode_tokens", "Tokens shown.", registry=own)

    def _add_state(self, own: CollectorRegistry) -> None:
        """Say what waits, runs, is connected, and whether the canary passes."""
        self.queue = Gauge("safe_decode_queue_rows", "Rows that wait.", registry=own)
        self.running = Gauge("safe_decode_running_rows", "Rows that run.", registry=own)
        self.ready = Gauge("safe_decode_ready", "1 while the last canary has passed.", registry=own)
        self.canary = Gauge("safe_decode_canary_difference", "Largest difference.", registry=own)
        self.canary_runs = Counter(
            "safe_decode_canary_runs", "Canaries run.", ["result"], registry=own
        )
        self.connections = Gauge("safe_decode_connections", "Open connections.", registry=own)
        self.dropped_connections = Counter(
            "safe_decode_connections_dropped",
            "Connections that the server ended: headers or a reader too slow, or no room.",
            ["why"],
            registry=own,
        )

    def _add_times(self, own: CollectorRegistry) -> None:
        """Say how long things take and how large runs and trips are."""
        self.ttft = Histogram(
            "safe_decode_ttft_seconds", "To the first shown token.", buckets=_SECONDS, registry=own
        )
        self.tpot = Histogram(
            "safe_decode_tpot_seconds",
            "For each shown token after it.",
            buckets=_SECONDS,
            registry=own,
        )
        self.waited = Histogram(
            "safe_decode_queue_seconds", "In the queue.", buckets=_SECONDS, registry=own
        )
        self.dropped = Histogram(
            "safe_decode_trip_dropped_tokens",
            "Taken back at a trip.",
            buckets=_TOKENS,
            registry=own,
        )
        self.batch = Histogram(
            "safe_decode_run_rows",
            "Rows of a run.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=own,
        )
        self.step = Histogram(
            "safe_decode_step_seconds",
            "A decoding step of a run, as the host sees it.",
            buckets=(*_STEP_SECONDS, 1, 2.5, 5),
            registry=own,
        )
        self.guard = Histogram(
            "safe_decode_guard_seconds",
            "Of a step, the guard's own time, which the next token of each row waits for: probe, "
            "monitor, policy, the closing forward. Its sum over that of the steps is the overhead.",
            buckets=_STEP_SECONDS,
            registry=own,
        )

    def note_steps(self, times: StepTimes | None) -> None:
        """Count the steps of a run; None: nobody took their time."""
        if times is None:
            return
        for step_s, guard_s in zip(times.step_s, times.guard_s, strict=True):
            self.step.observe(step_s)
            self.guard.observe(guard_s)

    def text(self) -> bytes:
        """Return the exposition."""
        return generate_latest(self.registry)
