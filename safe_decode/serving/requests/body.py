"""Bodies of requests read beside the event loop: bytes to what is asked.

Knows JSON as bytes, how much of it is read, and the one thread that reads. Does not know
engines or what is done with what was asked.

A thread alone does not free the loop: a call into a library written in C keeps Python's lock to
its end. So what makes such a call long is counted first, in steps that others can interrupt: a
body is as long as the operator lets it be, and few of its bytes may be structure.
"""

from __future__ import annotations

import asyncio
import re
import typing
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from safe_decode.serving.requests.admission import admitted
from safe_decode.serving.schemas.errors import ApiError
from safe_decode.serving.schemas.requests import RequestBody

__all__ = ["ReadingRoute", "BodyReader", "read_ask"]

Read = TypeVar("Read")
Ask = TypeVar("Ask", bound=BaseModel)

_MOST_STRINGS = 8_192
"""Keys and values that are strings; 512 messages have 2,048."""
_MOST_OPENED = 8_192
"""Objects and lists."""
_MOST_COMMAS = 210_000
"""Values, roughly; a prompt may have 200,000 ids."""
_MOST_ERRORS = 64
# A string that does not end reaches to the end of the body, so that no byte is looked at twice.
_STRING = re.compile(rb'"(?>[^"\\]+|\\.)*+(?:"|\Z)', re.DOTALL)


class BodyReader:
    """Reads requests in a thread of its own, in the order in which they came.

    One thread, since tokenizers keep state between calls, and Python runs one at a time anyway.

    Args:
        most_waiting: Requests that wait to be read; more are refused with 429.
    """

    def __init__(self, most_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="safe-decode-read")
        self._most_waiting, self._waiting = most_waiting, 0

    async def read(self, work: Callable[[], Read]) -> Read:
        """Do some reading; on the event loop, which goes on meanwhile.

        Raises:
            ApiError: Too many wait.
        """
        if self._waiting >= self._most_waiting:
            raise ApiError(
                429,
                f"{self._waiting} requests wait to be read; try again later.",
                code="queue_full",
                retry_after_s=5,
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._waiting -= 1


class ReadingRoute(APIRoute):
    """A route whose endpoint takes what is asked and the request, read by the service's reader.

    FastAPI itself would decode and validate the body on the event loop.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request: FastAPI's own where nothing is asked by a body."""
        kind = typing.get_type_hints(self.endpoint).get("ask")
        if kind is None:
            return super().get_route_handler()

        async def handle(request: Request) -> Response:
            body = await request.body()
            content_type = request.headers.get("content-type", "")
            service = request.app.state.service
            reader: BodyReader = service.reader
            is_strict: bool = service.settings.strict_parameters

            def read() -> tuple[RequestBody, tuple[str, ...]]:
                ask: RequestBody = read_ask(kind, body, content_type)
                return ask, admitted(ask, is_strict=is_strict)

            ask, request.state.ignored = await reader.read(read)
            answer: Response = await self.endpoint(ask, request)
            return answer

        return handle


def read_ask(kind: type[Ask], body: bytes, content_type: str) -> Ask:
    """Read a body.

    Args:
        kind: What it must be.
        body: Its bytes.
        content_type: Of the request; a page elsewhere can send plain text without asking.

    Raises:
        ApiError: Not called JSON, or of more pieces than are read.
        RequestValidationError: Not of that kind; holds the first field at fault.
    """
    essence = content_type.partition(";")[0].strip().lower()
    if not (essence == "application/json" or re.fullmatch(r"application/\S+\+json", essence)):
        raise ApiError(
            400,
            f"the body has the content type {essence[:100]!r}; send application/json.",
            param="content-type",
            code="invalid_value",
        )
    _require_few_pieces(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > _MOST_ERRORS:  # to write each of them takes as long as reading
            raise ApiError(
                400,
                f"{error.error_count()} fields of the body are not as wanted; send what the "
                "interface describes.",
                param="body",
                code="invalid_value",
            ) from None
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError(found[:1]) from None


def _require_few_pieces(body: bytes) -> None:
    strings = opened = commas = at = 0
    for match in _STRING.finditer(body):
        between = body[at : match.start()]
        at = match.end()
        strings += 1
        opened += between.count(b"{") + between.count(b"[")
        commas += between.count(b",")
        if strings > _MOST_STRINGS:
            break
    rest = body[at:]
    opened += rest.count(b"{") + rest.count(b"[")
    commas += rest.count(b",")
    for what, n, most in (
        ("strings", strings, _MOST_STRINGS),
        ("objects and lists", opened, _MOST_OPENED),
        ("values", commas, _MOST_COMMAS),
    ):
        if n > most:
            raise ApiError(
                400,
                f"the body has more than {most} {what}; send fewer.",
                param="body",
                code="invalid_value",
            )
