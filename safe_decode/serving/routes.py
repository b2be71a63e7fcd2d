"""The endpoints that answer: chat completions, completions, messages, responses, models.

Knows which shape belongs to which path. Does not know queues, engines or how bodies are read.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse

from safe_decode.engines.rows import RowRequest
from safe_decode.serving.requests.body import ReadingRoute
from safe_decode.serving.requests.parse import unread_variables
from safe_decode.serving.scheduling.service import ResponseInProgress, Service
from safe_decode.serving.schemas.anthropic import MessageFormatter
from safe_decode.serving.schemas.errors import ApiError
from safe_decode.serving.schemas.openai import ChatFormatter, CompletionFormatter, ResponseFormatter
from safe_decode.serving.schemas.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    CountTokensRequest,
    MessagesRequest,
    TokenizeRequest,
)
from safe_decode.serving.schemas.responses import ResponsesFormatter
from safe_decode.serving.schemas.responses_request import ResponsesRequest

__all__ = ["routes", "stream_chunks"]

_UNSERVED = {
    "/v1/embeddings": "no embeddings are made",
    "/v1/moderations": "nothing is judged but the answers written here",
    "/v1/images/generations": "no pictures are made",
    "/v1/audio/speech": "no sound is made",
    "/v1/audio/transcriptions": "no sound is read",
    "/v1/rerank": "nothing is ranked",
}
"""Endpoints of other servers, and why they are none of this one."""


def routes(service: Service) -> APIRouter:
    """Build the router of one server."""
    router = APIRouter(route_class=ReadingRoute)
    _add_openai(router, service)
    _add_anthropic(router, service)
    _add_responses(router, service)
    _add_tokens(router, service)
    _add_unserved(router)
    _add_models(router, service.settings.name)
    return router


def _add_openai(router: APIRouter, service: Service) -> None:
    desk, read = service.desk, service.reader.read
    fingerprint = f"sd-{service.engine.facts.bundle[:12]}"
    told = (service.settings.name, fingerprint, service.engine.token_text)

    async def openai(
        rows: list[RowRequest],
        ask: ChatCompletionRequest | CompletionRequest,
        request: Request,
        shape: ResponseFormatter,
    ) -> Response:
        conversation = await service.begin(rows, request, shape.name)
        if ask.stream:
            counts = bool(ask.stream_options and ask.stream_options.include_usage)
            return stream_chunks(conversation, shape, counts=counts)
        stories = await service.finish(conversation, request)
        return JSONResponse(shape.whole(stories))

    @router.post("/v1/chat/completions")
    async def chat_completions(ask: ChatCompletionRequest, request: Request) -> Response:
        shape = ChatFormatter(*told, gives_ids=bool(ask.return_token_ids))
        _require_stream_options(ask)
        is_shadow = service.is_shadow(request)
        rows = await read(lambda: desk.chat(ask, is_shadow=is_shadow))
        request.state.ignored += unread_variables(ask, rows[0].prompt)
        return await openai(rows, ask, request, shape)

    @router.post("/v1/completions")
    async def completions(ask: CompletionRequest, request: Request) -> Response:
        shape = CompletionFormatter(*told, gives_ids=bool(ask.return_token_ids))
        _require_stream_options(ask)
        is_shadow = service.is_shadow(request)
        rows = await read(lambda: desk.completion(ask, is_shadow=is_shadow))
        return await openai(rows, ask, request, shape)


def _add_anthropic(router: APIRouter, service: Service) -> None:
    desk, read, name = service.desk, service.reader.read, service.settings.name

    @router.post("/v1/messages")
    async def messages(ask: MessagesRequest, request: Request) -> Response:
        shape = MessageFormatter(name, gives_ids=bool(ask.return_token_ids))
        is_shadow = service.is_shadow(request)
        rows = await read(lambda: desk.messages(ask, is_shadow=is_shadow))
        conversation = await service.begin(rows, request, "message")
        if ask.stream:
            return _stream_of(_named(conversation, shape))
        (story,) = await service.finish(conversation, request)
        return JSONResponse(shape.whole(story))


def _add_responses(router: APIRouter, service: Service) -> None:
    desk, read, name = service.desk, service.reader.read, service.settings.name

    @router.post("/v1/responses")
    async def responses(ask: ResponsesRequest, request: Request) -> Response:
        shape = ResponsesFormatter(name, ask)
        is_shadow = service.is_shadow(request)
        rows = await read(lambda: desk.responses(ask, is_shadow=is_shadow))
        request.state.ignored += unread_variables(ask, rows[0].prompt)
        conversation = await service.begin(rows, request, "response")
        if ask.stream:
            return _stream_of(_named(conversation, shape))
        (story,) = await service.finish(conversation, request)
        return JSONResponse(shape.whole(story))


def _add_tokens(router: APIRouter, service: Service) -> None:
    desk, read = service.desk, service.reader.read

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(ask: CountTokensRequest, request: Request) -> Response:
        del request
        ids = await read(lambda: desk.prompt_ids(ask))
        return JSONResponse({"input_tokens": len(ids)})

    @router.post("/tokenize")
    async def tokenize(ask: TokenizeRequest, request: Request) -> Response:
        del request
        ids = await read(lambda: desk.prompt_ids(ask))
        most = service.engine.facts.context_tokens
        return JSONResponse({"count": len(ids), "max_model_len": most, "tokens": list(ids)})


def _add_unserved(router: APIRouter) -> None:
    """Refuse by name what clients may ask for because other servers have it."""

    async def unserved(request: Request) -> Response:
        path = request.url.path
        raise ApiError(
            404,
            f"{path} is not served: {_UNSERVED[path]}; this server writes guarded text alone. Ask "
            "another server for it.",
            code="unsupported_endpoint",
        )

    for path in _UNSERVED:
        router.add_api_route(path, unserved, methods=["POST"], include_in_schema=False)


def _add_models(router: APIRouter, served: str) -> None:
    model = {"id": served, "object": "model", "created": 0, "owned_by": "safe-decode"}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != served:
            raise ApiError(
                404, f"The model {name[:100]!r} is not served here.", code="model_not_found"
            )
        return model


def stream_chunks(
    conversation: ResponseInProgress, shape: ResponseFormatter, *, counts: bool
) -> Response:
    """Answer with a stream of chunks.

    Args:
        conversation: On its way.
        shape: Of the chunks.
        counts: Whether a chunk with the usage comes last.
    """
    return _stream_of(_chunks(conversation, shape, counts=counts))


def _stream_of(events: AsyncIterator[ServerSentEvent]) -> EventSourceResponse:
    return EventSourceResponse(events, sep="\n", headers={"Cache-Control": "no-store"})


def _require_stream_options(ask: ChatCompletionRequest | CompletionRequest) -> None:
    if ask.stream_options is not None and not ask.stream:
        raise ApiError(
            400,
            "stream_options goes with stream=true; leave it out.",
            param="stream_options",
            code="invalid_value",
        )


async def _chunks(
    conversation: ResponseInProgress, shape: ResponseFormatter, *, counts: bool
) -> AsyncIterator[ServerSentEvent]:
    for index in range(len(conversation.stories)):
        opening = shape.first(index)
        if opening is not None:
            yield _data(opening, counts=counts)
    async with aclosing(conversation.events) as events:
        async for index, event in events:
            for chunk in shape.chunks(index, conversation.stories[index], event):
                yield _data(chunk, counts=counts)
    if counts:
        yield _data(shape.usage_chunk(conversation.stories))
    yield ServerSentEvent("[DONE]", sep="\n")


async def _named(
    conversation: ResponseInProgress, shape: MessageFormatter | ResponsesFormatter
) -> AsyncIterator[ServerSentEvent]:
    (story,) = conversation.stories
    for name, body in shape.opening(story):
        yield ServerSentEvent(_json(body), event=name, sep="\n")
    async with aclosing(conversation.events) as events:
        async for _, event in events:
            for name, body in shape.events(story, event):
                yield ServerSentEvent(_json(body), event=name, sep="\n")


def _data(chunk: dict[str, Any], *, counts: bool = False) -> ServerSentEvent:
    # Asked for, usage stands in every chunk, null in all but the last.
    return ServerSentEvent(_json({**chunk, "usage": None} if counts else chunk), sep="\n")


def _json(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
