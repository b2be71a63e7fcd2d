"""The server as a process: where it listens and how it ends.

Knows uvicorn and signals. Does not know endpoints. On SIGTERM or SIGINT
nothing new is taken, rows in flight have their grace, and then every stream gets its end.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from safe_decode.serving.middleware.connections import BoundedConfig, require_descriptors
from safe_decode.serving.scheduling.service import Service
from safe_decode.serving.settings import ServeSettings

__all__ = ["Drains", "GuardedServer", "serve_app"]


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


def serve_app(app: FastAPI, settings: ServeSettings, on_start: Callable[[str], None]) -> None:
    """Serve until told to end.

    Args:
        app: From `create_app`.
        settings: Where to listen, and the grace.
        on_start: Called with the address once it listens.

    Raises:
        ConfigurationError: More connections than this process may have open files.
    """
    require_descriptors(settings)
    service: Service = app.state.service
    # What is loaded by now stays. The garbage collector need not go over it again and again, which
    # would hold the event loop for as long.
    gc.collect()
    gc.freeze()
    GuardedServer(
        BoundedConfig(app, settings, service.metrics),
        service.scheduler,
        grace_s=settings.shutdown_grace_s,
        on_start=on_start,
    ).run()
