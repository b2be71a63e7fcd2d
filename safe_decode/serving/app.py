"""The application: endpoints behind the gate, errors in the client's shape, life and end.

Knows how the parts are put together. Does not know how any of them works.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sse_starlette.sse import AppStatus
from starlette.exceptions import HTTPException

from safe_decode.engines.interface import Engine
from safe_decode.errors import SafeDecodeError
from safe_decode.serving.middleware.gate import Gate
from safe_decode.serving.middleware.origins import OpenToOrigins
from safe_decode.serving.pages import pages
from safe_decode.serving.routes import routes
from safe_decode.serving.scheduling.service import Service
from safe_decode.serving.schemas.errors import ApiError, anthropic_body, openai_body
from safe_decode.serving.settings import ServeSettings

__all__ = ["create_app"]

_LOG = logging.getLogger("safe_decode.serving")


def create_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """Build the application; it serves once its lifespan has begun and the canary has passed.

    Args:
        engine: Runs rows.
        settings: The operator's.

    Raises:
        ConfigurationError: The audit log cannot be written.
    """
    service = Service(engine, settings)
    # Streams end by themselves when the server is told to end, see Scheduler.drain.
    AppStatus.enable_automatic_graceful_drain = False
    # That module logs each chunk for debugging; texts are never logged.
    logging.getLogger("sse_starlette.sse").setLevel(logging.INFO)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        try:
            yield
        finally:
            await service.scheduler.drain(0)
            service.audit.close()

    app = FastAPI(
        title="safe-decode",
        description="Guarded generation behind OpenAI's and Anthropic's interfaces.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(routes(service))
    app.include_router(_operation(service))
    if settings.page:
        app.include_router(pages(service))
    _tell_errors(app)
    _name_model(app, settings.name)
    app.add_middleware(
        Gate, settings=settings, metrics=service.metrics, marker=engine.facts.bundle[:16]
    )
    if settings.cors_origins:
        app.add_middleware(OpenToOrigins, origins=settings.cors_origins)
    return app


def _name_model(app: FastAPI, name: str) -> None:
    """Let the OpenAPI document say which model requests may name: the one that is served."""
    general = app.openapi

    def document() -> dict[str, Any]:
        told = general()
        for schema in told["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"]["enum"] = [name]
        return told

    app.openapi = document  # type: ignore[method-assign]


def _operation(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        if service.scheduler.is_serving:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, status_code=503, headers={"Retry-After": "5"})

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def _tell_errors(app: FastAPI) -> None:
    def answer(request: Request, error: ApiError) -> JSONResponse:
        is_anthropic = request.url.path.startswith("/v1/messages")
        body = anthropic_body(error) if is_anthropic else openai_body(error)
        return JSONResponse(body, status_code=error.status, headers=dict(error.headers))

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, _invalid(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(SafeDecodeError)
    async def ours(request: Request, error: SafeDecodeError) -> JSONResponse:
        return answer(request, ApiError(400, str(error)))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        _LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
        return answer(request, ApiError(500, "the server failed; it has been logged."))


def _invalid(error: RequestValidationError) -> ApiError:
    """Name the first field at fault; what was sent is not repeated."""
    problems = error.errors()
    first = problems[0] if problems else {}
    place = [str(part) for part in first.get("loc", ()) if part != "body"]
    param = ".".join(place[:6])[:200] or None
    if first.get("type") == "extra_forbidden":
        message, code = f"Unrecognized request argument supplied: {param}", "unknown_parameter"
    else:
        message, code = f"{param or 'the body'}: {first.get('msg', 'invalid')}", "invalid_value"
    return ApiError(400, message[:1000], param=param, code=code)
