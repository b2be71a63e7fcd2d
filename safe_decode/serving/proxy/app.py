"""The proxy as an application and a process: what stands around the guarded endpoints.

Knows how the parts are put together, and the first screen. Does not know how any of them works.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from safe_decode.serving.middleware.gate import Gate
from safe_decode.serving.proxy.middleware import ProxyParts, SafetyMiddleware
from safe_decode.serving.proxy.settings import LoadedProxySettings, ProxySettings
from safe_decode.serving.schemas.errors import ApiError, openai_body

__all__ = ["create_proxy_app", "proxy_screen"]


def create_proxy_app(settings: ProxySettings, parts: ProxyParts | None = None) -> FastAPI:
    """Build the application.

    Args:
        settings: The operator's.
        parts: To be used instead of one's own, in tests.

    Raises:
        ConfigurationError: The audit log cannot be written.
    """
    own = parts or ProxyParts.of(settings)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await own.close()

    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.parts = own

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        try:
            await own.upstream.require_sound()
        except ApiError as error:
            return JSONResponse(openai_body(error), error.status, headers=dict(error.headers))
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(own.metrics.text(), media_type="text/plain; version=0.0.4")

    app.add_middleware(
        Gate, settings=settings.as_server, metrics=own.metrics, marker=settings.marker
    )
    # Added last, so that it stands outermost; it has a gate of its own.
    app.add_middleware(SafetyMiddleware, settings=settings, parts=own)
    return app


def proxy_screen(loaded: LoadedProxySettings) -> list[tuple[str, str]]:
    """Say what is guarded, what is refused, and where each setting came from."""
    settings, sources = loaded
    given: Mapping[str, list[str]] = {
        source: sorted(name for name, origin in sources.items() if origin == source)
        for source in ("flag", "--set", "environment", "file")
    }
    from_where = "; ".join(
        f"{source}: {', '.join(names)}" for source, names in given.items() if names
    )
    return [
        ("upstream", settings.upstream),
        ("bundle", f"{settings.marker}: an answer without this mark is not shown"),
        ("hold-back", f"{settings.holdback_tokens} tokens, besides the upstream's"),
        ("canary", f"the upstream's /readyz, asked again after {settings.canary_every_s:g} s"),
        (
            "refused",
            "tools, audio, echo, suffix, best_of, unknown parameters; of answers, unknown fields",
        ),
        ("keys", f"{len(settings.api_keys)}" if settings.api_keys else "none: anybody may ask"),
        (
            "/metrics",
            f"{len(settings.operator_keys)} keys" if settings.operator_keys else "no operator_keys",
        ),
        (
            "upstream's key",
            "set, attached for clients with a key alone" if settings.upstream_key else "none",
        ),
        ("audit", str(settings.audit or "none")),
        ("settings", from_where or "defaults"),
    ]
