"""Which pages of other origins may call the endpoints from a browser. Plain ASGI.

Knows paths and origins. Does not know keys: a page sends one as any client does. Endpoints for
operators and the server's own page are open to no other origin, whatever the setting says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from safe_decode.serving.middleware.gate import MARKER
from safe_decode.serving.requests.admission import CHANGED, IGNORED

__all__ = ["OpenToOrigins"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HOUR_S = 3600


class OpenToOrigins:
    """Answers browsers that ask whether a page may call, for the endpoints of clients alone.

    Args:
        app: Behind it, the gate first.
        origins: Of pages; "*": any.
    """

    def __init__(self, app: App, origins: Sequence[str]) -> None:
        self._app = app
        self._open = CORSMiddleware(
            app,
            allow_origins=tuple(origins),
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(MARKER, IGNORED, CHANGED, "x-request-id", "retry-after"),
            max_age=_HOUR_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, with what its browser must be told."""
        path = scope.get("path", "")
        is_open = scope["type"] == "http" and (path.startswith("/v1/") or path == "/tokenize")
        if is_open:
            await self._open(scope, receive, send)
        else:
            await self._app(scope, receive, send)
