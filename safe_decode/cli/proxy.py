"""`safe-decode proxy`: guards an upstream whose engine carries the guard.

Knows the flags, the first screen and the process. Does not know endpoints. Every setting can
also be given by `--config`, the environment, or `--set`; the upstream's key by the first two alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import console
from safe_decode.cli.options import AuditFile, ClientKeys, ConfigFile, FurtherSettings
from safe_decode.cli.tables import WordTable, print_table
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from safe_decode.serving.proxy.settings import LoadedProxySettings

__all__ = ["proxy"]


@dataclass(frozen=True, kw_only=True)
class ProxyOptions:
    """Options of `safe-decode proxy`; None leaves a setting to file, environment or default."""

    upstream: Annotated[
        str | None, typer.Option(help="Address of the upstream server, without /v1 at its end.")
    ] = None
    bundle: Annotated[
        str | None,
        typer.Option(
            help="Digest of the bundle that the upstream must carry, as `safe-decode inspect` "
            "prints it."
        ),
    ] = None
    config: ConfigFile = None
    host: Annotated[str | None, typer.Option(help="Address that the proxy listens on.")] = None
    port: Annotated[
        int | None, typer.Option(help="Port that the proxy listens on. 0: any free port.")
    ] = None
    holdback_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that the proxy holds back, besides those the upstream holds."),
    ] = None
    api_key: ClientKeys = None
    audit: AuditFile = None
    settings: FurtherSettings = None


@command("Serve")
def proxy(options: ProxyOptions) -> None:
    """Guard the clients of another server: what lacks the mark of the bundle is not shown.

    The upstream's own key is read from SAFE_DECODE_PROXY_UPSTREAM_KEY or the file of --config.
    """
    try:
        from safe_decode.serving.proxy.settings import load_proxy_settings
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{error.name} is missing; install the server with: pip install 'safe-decode[serving]'"
        ) from error
    loaded = load_proxy_settings(
        options.config,
        flags={
            "upstream": options.upstream,
            "bundle": options.bundle,
            "host": options.host,
            "port": options.port,
            "holdback_tokens": options.holdback_tokens,
            "api_keys": tuple(options.api_key) if options.api_key else None,
            "audit": options.audit,
        },
        assignments=_assignments(options.settings or []),
    )
    _run(loaded)


def _assignments(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigurationError(
                f"--set {name!r} has no value, wanted NAME=VALUE; pass for example port=0."
            )
        pairs[name.strip().replace("-", "_")] = value
    return pairs


def _run(loaded: LoadedProxySettings) -> None:
    from safe_decode.serving.middleware.connections import BoundedConfig, require_descriptors
    from safe_decode.serving.process import GuardedServer
    from safe_decode.serving.proxy.app import create_proxy_app, proxy_screen

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    settings, server = loaded.settings, loaded.settings.as_server
    require_descriptors(server)
    app = create_proxy_app(settings)
    GuardedServer(
        BoundedConfig(app, server, app.state.parts.metrics),
        app.state.parts.deadlines,
        grace_s=settings.shutdown_grace_s,
        on_start=lambda address: _show(address, proxy_screen(loaded)),
    ).run()


def _show(address: str, rows: list[tuple[str, str]]) -> None:
    table = WordTable(("", ""), rows, title=f"safe-decode guards {address}")
    print_table(table, console(stderr=True))
