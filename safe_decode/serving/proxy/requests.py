"""What of a client's request goes upstream: the fields that are listed here, and no others.

Knows the request bodies of the server and which of their fields an upstream may read. Does not
know answers or HTTP. A field that is not known is refused by name, so that no parameter of some
engine (`vllm_xargs`, `stop_token_ids`, `echo`, ...) passes because nobody thought of it. What the
server ignores is dropped, by the same table; what the server honours goes upstream if it is
listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from safe_decode.serving.requests.admission import admitted
from safe_decode.serving.schemas.errors import ApiError
from safe_decode.serving.schemas.field_table import FIELDS
from safe_decode.serving.schemas.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    MessagesRequest,
)

__all__ = ["CHAT", "COMPLETIONS", "MESSAGES", "ProxiedAsk", "known_parameters", "read_ask"]

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"

_Body = ChatCompletionRequest | CompletionRequest | MessagesRequest

_KINDS: Mapping[str, type[_Body]] = {
    CHAT: ChatCompletionRequest,
    COMPLETIONS: CompletionRequest,
    MESSAGES: MessagesRequest,
}
_DRAWN = {"model", "temperature", "top_p", "top_k", "stream", "safety"}
_OPENAI = _DRAWN | {
    *(
        "min_p",
        "repetition_penalty",
        "n",
        "stream_options",
        "stop",
        "max_tokens",
        "presence_penalty",
        "frequency_penalty",
    ),
    *("logit_bias", "seed", "logprobs"),
}
_FORWARDED: Mapping[str, set[str]] = {
    CHAT: _OPENAI | {"messages", "max_completion_tokens", "top_logprobs", "response_format"},
    COMPLETIONS: _OPENAI | {"prompt"},
    MESSAGES: _DRAWN | {"messages", "max_tokens", "system", "stop_sequences"},
}
_DROPPED = {"return_token_ids"}  # the proxy asks for ids itself
_SAYS_NOTHING: tuple[object, ...] = (None, False, 0, {}, "none")
"""Values of fields that are not passed on that ask for what happens anyway."""


@dataclass(frozen=True)
class ProxiedAsk:
    """One request, as it goes upstream, and what its reader may get.

    Attributes:
        path: The endpoint.
        body: What goes upstream.
        model: As the client wrote it.
        n_choices: Answers that the client asked for.
        is_stream: Whether it wants a stream.
        keeps_ids: Whether it asked for token ids.
        has_logprobs: Whether it asked for log-probabilities.
        counts_usage: Whether it asked for a chunk that counts.
        stops: Its own stop strings.
        ignored: Names of fields that were accepted and ignored.
    """

    path: str
    body: Mapping[str, Any]
    model: str
    n_choices: int = 1
    is_stream: bool = False
    keeps_ids: bool = False
    has_logprobs: bool = False
    counts_usage: bool = False
    stops: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def read_ask(path: str, body: bytes, *, max_choices: int, is_strict: bool = False) -> ProxiedAsk:
    """Read a request's body.

    Args:
        path: One of the three endpoints.
        body: As the client sent it.
        max_choices: Largest number of answers.
        is_strict: Refuse fields that would be ignored.

    Raises:
        ApiError: It is no such body, or asks for what is not passed on.
    """
    try:
        ask = _KINDS[path].model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None  # its text repeats what was sent
    ignored = admitted(ask, is_strict=is_strict)
    forwarded = _FORWARDED[path]
    for name in sorted(ask.model_fields_set - forwarded - _DROPPED):
        if getattr(ask, name) not in _SAYS_NOTHING:
            raise ApiError(
                400,
                f"{name} is not supported: the proxy does not pass it on; leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    told = ask.model_dump(mode="json", include=forwarded, exclude_none=True, exclude_unset=True)
    has_logprobs = getattr(ask, "logprobs", None)
    options = getattr(ask, "stream_options", None)
    return ProxiedAsk(
        path=path,
        body={**told, "return_token_ids": True},
        model=ask.model,
        n_choices=_choices(ask, max_choices),
        is_stream=bool(ask.stream),
        keeps_ids=bool(ask.return_token_ids),
        # For completions it is a number, of which 0 asks for the chosen tokens' own.
        has_logprobs=has_logprobs is not None and has_logprobs is not False,
        counts_usage=bool(options and options.include_usage),
        stops=tuple(ask.stop_sequences or ()) if isinstance(ask, MessagesRequest) else (),
        ignored=ignored,
    )


def known_parameters() -> frozenset[str]:
    """Return the names of all fields of all three bodies."""
    return frozenset(row.name for row in FIELDS) | frozenset(
        name for kind in _KINDS.values() for name in kind.model_fields
    )


def _choices(ask: _Body, most: int) -> int:
    if isinstance(ask, MessagesRequest):
        return 1
    prompts = 1
    if isinstance(ask, CompletionRequest) and not isinstance(ask.prompt, str):
        prompts = 1 if isinstance(ask.prompt[0], int) else len(ask.prompt)
    asked = prompts * (ask.n or 1)
    if asked > most:
        raise ApiError(
            400,
            f"n={ask.n or 1} for {prompts} prompts asks for {asked} answers, at most {most} are "
            "given; ask for fewer.",
            param="n",
            code="invalid_value",
        )
    return asked


def _invalid(error: ValidationError) -> ApiError:
    """Name the first field at fault; what was sent is not repeated."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON.", code="invalid_value")
    param = ".".join(str(part)[:64] for part in first["loc"][:6])[:200] or None
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"Unrecognized request argument supplied: {param}",
            param=param,
            code="unknown_parameter",
        )
    return ApiError(
        400, f"{param or 'the body'}: {first['msg'][:200]}", param=param, code="invalid_value"
    )
