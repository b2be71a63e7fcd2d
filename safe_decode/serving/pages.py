"""The page at / and what it asks for beyond the public endpoints.

Knows files of the package, the demo's prompts and the operator's consent to show the bare
model. Does not know how rows run. With `expose_bare` alone there are endpoints for the bare
model's answers and for guarded ones with what was taken back; clients' endpoints never have it.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from safe_decode.engines.rows import RowRequest
from safe_decode.serving.requests.body import ReadingRoute
from safe_decode.serving.routes import stream_chunks
from safe_decode.serving.scheduling.service import Service
from safe_decode.serving.schemas.errors import ApiError
from safe_decode.serving.schemas.openai import ChatFormatter
from safe_decode.serving.schemas.requests import ChatCompletionRequest

__all__ = ["pages"]

_FILES = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "chart.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_SHOWN_SCENES = 12


def pages(service: Service) -> APIRouter:
    """Build the router of the page."""
    router = APIRouter(include_in_schema=False, route_class=ReadingRoute)
    folder = resources.files("safe_decode.serving") / "page"

    @router.get("/")
    async def page() -> Response:
        return Response((folder / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    @router.get("/page/facts")
    async def facts() -> dict[str, Any]:
        return _facts(service)

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in _FILES:
            raise ApiError(404, "there is no such file.")
        return Response(
            (folder / name).read_bytes(),
            media_type=_FILES[name],
            headers={"Cache-Control": "no-cache"},
        )

    if service.settings.expose_bare:

        @router.post("/page/bare")
        async def bare(ask: ChatCompletionRequest, request: Request) -> Response:
            rows = [
                replace(row, policy=replace(row.policy, redirect="flag", holdback_tokens=0))
                for row in await service.reader.read(lambda: service.desk.chat(ask))
            ]
            return await _streamed(service, rows, request, "bare")

        @router.post("/page/guarded")
        async def guarded(ask: ChatCompletionRequest, request: Request) -> Response:
            rows = await service.reader.read(lambda: service.desk.chat(ask))
            return await _streamed(service, rows, request, "guarded")

    return router


async def _streamed(
    service: Service, rows: list[RowRequest], request: Request, arm: str
) -> Response:
    shape = ChatFormatter(service.settings.name, arm, service.engine.token_text)
    conversation = await service.begin(rows, request, arm, is_page=True)
    return stream_chunks(conversation, shape, counts=False)


def _facts(service: Service) -> dict[str, Any]:
    settings, facts = service.settings, service.engine.facts
    certificate = facts.certificate
    told: dict[str, Any] = {
        "model": settings.name,
        "bundle": facts.bundle[:16],
        "redirect": facts.redirect,
        "holdback_tokens": facts.holdback_tokens,
        "max_tokens": settings.max_new_tokens or service.engine.facts.certified_cap,
        "shows_scores": settings.expose_scores,
        "shows_bare": settings.expose_bare,
        "needs_key": bool(settings.api_keys or settings.shadow_keys),
        "certificate": {
            "alpha": certificate.alpha,
            "confidence": 1 - certificate.delta,
            "responses": certificate.n,
            "population": certificate.population,
            "source": certificate.evidence.source,
            "calibrated_on": certificate.evidence.in_words,
            "greedy": not certificate.envelope.do_sample,
            "max_new_tokens": certificate.envelope.max_new_tokens,
        },
        "scenes": _scenes() if settings.is_demo else [],
    }
    # Facts are told without a key, since the page asks for one by them.
    if settings.expose_scores and not told["needs_key"]:
        told["certificate"]["threshold"] = certificate.threshold
    return told


def _scenes() -> list[dict[str, Any]]:
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.demo.scenes import SCENES, read_prompts

    prompts = read_prompts(artefact("prompts.jsonl"))
    shown = []
    for scene, words in SCENES.items():
        own = sorted((p for p in prompts if p.scene == scene), key=lambda p: not p.showcase)
        if own:
            shown.append(
                {
                    "scene": scene,
                    "title": words.title,
                    "about": words.about,
                    "prompts": [
                        {"messages": list(p.messages), "prefill": p.prefill}
                        for p in own[:_SHOWN_SCENES]
                    ],
                }
            )
    return shown
