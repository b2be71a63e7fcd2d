"""The server as a process: where it listens, what it says at start, how it ends.

Knows uvicorn, signals and the first screen. Does not know endpoints. On SIGTERM or SIGINT
nothing new is taken, rows in flight have their grace, and then every stream gets its end.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from safe_decode.serving.engine import GuardFacts
from safe_decode.serving.scheduler import Scheduler
from safe_decode.serving.settings import ServeSettings

__all__ = ["Drains", "GuardedServer", "config_of", "first_screen", "serve_app"]


class Drains(Protocol):
    """What has answers in flight that are to end before the process does."""

    def begin_drain(self) -> None:
        """Take nothing new from now on."""

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, let answers end, then end what is left."""


class GuardedServer(uvicorn.Server):
    """Uvicorn that lets streams end before it does.

    Args:
        config: Of uvicorn.
        scheduler: Whose rows are to end.
        grace_s: What they have for it.
        on_start: Called with the address once it listens.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        scheduler: Drains,
        *,
        grace_s: float,
        on_start: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._scheduler, self._grace_s, self._on_start = scheduler, grace_s, on_start
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Begin to listen, and say where."""
        await super().startup(sockets)  # type: ignore[arg-type]
        self._loop = asyncio.get_running_loop()
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._on_start(f"http://{shown}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take nothing new and let what runs end; a second SIGINT ends at once.

        The signal is not raised again afterwards, as uvicorn does: an orderly end is status 0.
        """
        del frame
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        if self._loop is not None and self._draining is None:
            self._scheduler.begin_drain()
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self._scheduler.drain(self._grace_s))


def config_of(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    """Return uvicorn's configuration: no access log, since it would hold no more than metrics."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.shutdown_grace_s) + 15,
        h11_max_incomplete_event_size=64 * 1024,
    )


def serve_app(app: FastAPI, settings: ServeSettings, on_start: Callable[[str], None]) -> None:
    """Serve until told to end.

    Args:
        app: From `create_app`.
        settings: Where to listen, and the grace.
        on_start: Called with the address once it listens.
    """
    scheduler: Scheduler = app.state.service.scheduler
    GuardedServer(
        config_of(app, settings),
        scheduler,
        grace_s=settings.shutdown_grace_s,
        on_start=on_start,
    ).run()


def first_screen(settings: ServeSettings, facts: GuardFacts) -> list[tuple[str, str]]:
    """Say what is guarded, by which certificate, and what is refused, as names and texts."""
    certificate, envelope = facts.certificate, facts.certificate.envelope
    how = f"temperature {envelope.temperature:g}" if envelope.do_sample else "greedy"
    rows = [
        ("model", settings.name),
        ("bundle", facts.bundle[:16]),
        ("probe reads for", ", ".join(facts.heads)),
        (
            "certificate",
            f"at most {certificate.alpha:.3g} of {certificate.population} responses alarm, with "
            f"confidence {1 - certificate.delta:g}, from {certificate.n} responses",
        ),
        ("it speaks of", f"{how}, up to {envelope.max_new_tokens} tokens; else it is void"),
        ("a trip", f"{facts.redirect}, hold-back {facts.holdback_tokens} tokens"),
        (
            "refused",
            "tools, audio, echo, suffix, best_of, unknown parameters"
            + ("" if settings.allow_json else ", JSON formats"),
        ),
        ("keys", f"{len(settings.api_keys)}" if settings.api_keys else "none: anybody may ask"),
        ("audit", str(settings.audit or "none")),
    ]
    if settings.expose_scores:
        rows.append(("exposed", "statistics and threshold: an oracle for attackers"))
    if settings.expose_bare:
        rows.append(("exposed", "the bare model, unguarded, on the page"))
    return rows
