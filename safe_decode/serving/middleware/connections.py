"""Connections: how many there may be, and how long each may keep the server waiting.

uvicorn has a time for connections between requests and none for headers that never end or for
readers that take nothing; its h11 protocol is extended here by both, and by limits. Knows
sockets' states, times and addresses. Does not know requests.
"""

from __future__ import annotations

import asyncio
import sys
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from safe_decode.errors import ConfigurationError
from safe_decode.serving.middleware.crowd import BURST, Crowd, Dropped
from safe_decode.serving.middleware.gate import App
from safe_decode.serving.operations.metrics import Metrics
from safe_decode.serving.settings import ServeSettings

if TYPE_CHECKING:
    from uvicorn.server import ServerState

__all__ = ["BoundedConfig", "BoundedProtocol", "require_descriptors"]

_SPARE_DESCRIPTORS = 128 + BURST
"""For files, libraries, bursts, and connections that are accepted only to be refused."""


class BoundedConfig(uvicorn.Config):
    """Uvicorn's configuration for connections that are bounded.

    Args:
        app: The application.
        settings: Limits and times.
        metrics: Counts.
    """

    def __init__(self, app: App, settings: ServeSettings, metrics: Metrics) -> None:
        self.crowd = Crowd(settings, metrics)
        super().__init__(
            app,
            host=settings.host,
            port=settings.port,
            http=BoundedProtocol,
            ws="none",
            # Believed by nobody here, so read by nobody.
            proxy_headers=False,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.keep_alive_timeout_s,
            timeout_graceful_shutdown=int(settings.shutdown_grace_s) + 15,
            h11_max_incomplete_event_size=64 * 1024,
        )


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 on one connection, with a time for headers and a time for readers.

    Attributes:
        address: Whose it is; of IPv6 the network of 64 bits, which one customer has.
    """

    address = ""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, BoundedConfig)
        self._crowd = config.crowd
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def keeps_us_waiting(self) -> bool:
        """Say whether there is no whole request that the server works on."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse it."""
        super().connection_made(transport)
        self.address = _network(self.client[0] if self.client else "")
        # Whatever the reader has not taken stops the writer, and starts its time.
        transport.set_write_buffer_limits(high=0)
        if self._crowd.enter(self):
            self._time_headers()
        else:
            self._say(b"503 Service Unavailable", b"retry-after: 5\r\n")
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        for timer in (self._headers_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._crowd.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; headers that have begun must end in time."""
        super().data_received(data)
        self._time_headers()

    def pause_writing(self) -> None:
        """Wait for the reader, as long as it takes something now and then."""
        super().pause_writing()
        self._time_reader()

    def resume_writing(self) -> None:
        """Write on."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def drop(self, why: Dropped) -> None:
        """End the connection at once; what was not taken is lost."""
        self._crowd.count(why)
        self.transport.abort()

    def _time_headers(self) -> None:
        """Run the headers' time from their beginning to their end, whatever comes meanwhile."""
        is_open = not self.transport.is_closing() and self.conn.their_state is h11.IDLE
        if is_open and self._headers_timer is None:
            wait_s = self._crowd.settings.header_timeout_s
            self._headers_timer = self.loop.call_later(wait_s, self._end, "slow_headers")
        elif not is_open and self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _time_reader(self, before: int | None = None) -> None:
        """End a reader that has taken nothing of what waits for it since the last look."""
        left = self.transport.get_write_buffer_size()
        if left == before:
            self._end("slow_reader")
            return
        wait_s = self._crowd.settings.write_timeout_s
        self._write_timer = self.loop.call_later(wait_s, self._time_reader, left)

    def _end(self, why: Dropped) -> None:
        if why == "slow_headers" and not self.transport.is_closing():
            self._say(b"408 Request Timeout")
        self.drop(why)

    def _say(self, status: bytes, headers: bytes = b"") -> None:
        """Answer before there is a request; whoever does not listen misses it."""
        self.transport.write(
            b"HTTP/1.1 " + status + b"\r\n" + headers + b"connection: close\r\n"
            b"content-length: 0\r\n\r\n"
        )


def require_descriptors(settings: ServeSettings) -> None:
    """Let the process have as many open files as there may be connections.

    Raises:
        ConfigurationError: The system allows fewer.
    """
    if sys.platform == "win32":
        return
    import resource

    wanted = settings.max_connections + _SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigurationError(
            f"max_connections={settings.max_connections} wants {wanted} open files, and this "
            f"process may have {hard}; raise the limit (ulimit -Hn), or pass --set "
            f"max_connections={max(1, hard - _SPARE_DESCRIPTORS)}."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _network(host: str) -> str:
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # a socket of the file system
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(int(address) >> 64)
    return str(address)
