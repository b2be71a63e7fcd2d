"""Servers for tests: in this process, on a free port, around the stage of `tests.staged`."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from safe_decode.engines.interface import Engine
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.serving.app import create_app
from safe_decode.serving.middleware.connections import BoundedConfig
from safe_decode.serving.process import GuardedServer
from safe_decode.serving.settings import ServeSettings
from tests.staged import staged

MODEL = "staged"


@functools.cache
def staged_engine(redirect: str = "rewind") -> TransformersEngine:
    """One engine for all tests of a process; it keeps nothing between runs."""
    stage = staged()
    decoder = SafeDecoder(stage.model, stage.tokenizer, stage.bundle, redirect=redirect)  # type: ignore[arg-type]
    return TransformersEngine(decoder, tells_scores=True, keep_traces=True)


def settings_of(**changes: Any) -> ServeSettings:
    """Settings for a server on a free port, which may be called by any name."""
    own = {"port": 0, "shutdown_grace_s": 5, "served_name": MODEL, "allowed_hosts": ("*",)}
    given = {**own, **changes}
    return ServeSettings.model_validate(given)


@contextlib.contextmanager
def running(engine: Engine, settings: ServeSettings) -> Iterator[tuple[str, Any]]:
    """Serve in a thread; yields the address and the application."""
    app, began, address = create_app(engine, settings), threading.Event(), []

    def on_start(url: str) -> None:
        address.append(url)
        began.set()

    server = GuardedServer(
        BoundedConfig(app, settings, app.state.service.metrics),
        app.state.service.scheduler,
        grace_s=settings.shutdown_grace_s,
        on_start=on_start,
    )
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        assert began.wait(60), "the server did not start"
        yield address[0], app
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"
