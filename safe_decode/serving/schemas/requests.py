"""What clients may ask: the request bodies, and the fields that serving does something with.

Knows OpenAI's and Anthropic's parameters, their types and limits. Does not know models or how
they are answered. What else a body holds is kept as it came until the table of fields
(`field_table`) says what becomes of it: ignored by name, or refused, so that nothing a client
relies on is skipped in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from safe_decode.serving.schemas.field_rule import FieldPlace
from safe_decode.serving.schemas.field_table import as_rows
from safe_decode.serving.schemas.messages import (
    LENIENT,
    STRICT,
    AnthropicMessage,
    ChatMessage,
    Parts,
    Text,
    Turn,
    joined,
)

__all__ = [
    "ChatCompletionRequest",
    "CompletionRequest",
    "CountTokensRequest",
    "MessagesRequest",
    "OpenAIRequest",
    "RequestBody",
    "ResponseFormat",
    "SafetyOptions",
    "StreamOptions",
    "TokenizeRequest",
    "Variable",
]

Variable = bool | int | float | Annotated[str, Field(max_length=64)] | None
"""A value of a template's variable."""


def documented(place: FieldPlace) -> ConfigDict:
    """Return the configuration of a body whose document names the fields that are ignored."""

    def tell(schema: dict[str, Any]) -> None:
        ignored = as_rows(place)["ignored"]
        told = {row.name: {"description": f"Ignored: {row.why}."} for row in ignored}
        schema["properties"] = {**schema["properties"], **told}
        schema["additionalProperties"] = False

    told: ConfigDict = {**LENIENT, "json_schema_extra": tell}
    return told


class SafetyOptions(BaseModel):
    """What one request may tighten; it can never loosen what the operator set.

    Attributes:
        alpha: A certified level with a threshold at most the operator's.
        redirect: Another redirect that guards.
        holdback_tokens: At least the operator's.
    """

    model_config = STRICT

    alpha: float | None = Field(default=None, gt=0, lt=1)
    redirect: Literal["refuse", "rewind", "stop"] | None = None
    holdback_tokens: int | None = Field(default=None, ge=0, le=4096)


class StreamOptions(BaseModel):
    """What a stream holds besides its chunks."""

    model_config = LENIENT

    include_usage: bool | None = None


class ResponseFormat(BaseModel):
    """The form that is asked of the answer."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class RequestBody(BaseModel):
    """What every body has.

    Attributes:
        place: Of its fields in the table.
        model: Which model is asked.
    """

    place: ClassVar[FieldPlace]

    model: Annotated[str, Field(max_length=512)]

    def turns(self) -> Iterator[tuple[str, Turn]]:
        """Yield its messages, each with the place where it stands."""
        yield from ()


class OpenAIRequest(RequestBody):
    """What both of OpenAI's older endpoints take."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[str, Field(max_length=512)]
        | Annotated[list[str], Field(max_length=16, fail_fast=True)]
        | None
    ) = None
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0, le=1_000_000_000)
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    safety: SafetyOptions | None = None
    return_token_ids: bool | None = None


class ChatCompletionRequest(OpenAIRequest):
    """The body of /v1/chat/completions."""

    model_config = documented("chat")
    place = "chat"

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=512)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    chat_template_kwargs: Annotated[dict[str, Variable], Field(max_length=32)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None

    def turns(self) -> Iterator[tuple[str, Turn]]:
        """Yield its messages."""
        for number, message in enumerate(self.messages):
            yield f"messages.{number}", message


class CompletionRequest(OpenAIRequest):
    """The body of /v1/completions."""

    model_config = documented("completions")
    place = "completions"

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[list[int], Field(min_length=1, max_length=200_000, fail_fast=True)]
        | Annotated[
            list[Annotated[list[int], Field(min_length=1, max_length=200_000, fail_fast=True)]],
            Field(min_length=1, max_length=128, fail_fast=True),
        ]
    )
    logprobs: int | None = Field(default=None, ge=0, le=5)
    best_of: int | None = Field(default=None, ge=1)


class _ClaudeBody(RequestBody):
    """What Anthropic's endpoints have in common."""

    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=512)]
    system: Text | Parts | None = None

    def turns(self) -> Iterator[tuple[str, Turn]]:
        """Yield the system prompt if it comes in parts, then the messages."""
        if isinstance(self.system, list):
            yield "system", Turn.model_construct(content=self.system)
        for number, message in enumerate(self.messages):
            yield f"messages.{number}", message

    def spoken(self) -> list[dict[str, str]]:
        """Return roles and texts, the system prompt first."""
        system = joined(self.system)
        before = [{"role": "system", "content": system}] if system else []
        return before + [{"role": m.role, "content": m.as_text()} for m in self.messages]


class MessagesRequest(_ClaudeBody):
    """The body of /v1/messages."""

    model_config = documented("messages")
    place = "messages"

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    stop_sequences: Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    safety: SafetyOptions | None = None
    return_token_ids: bool | None = None


class CountTokensRequest(_ClaudeBody):
    """The body of /v1/messages/count_tokens."""

    model_config = documented("tokens")
    place = "tokens"


class TokenizeRequest(RequestBody):
    """The body of /tokenize: a prompt, or messages."""

    model_config = documented("tokens")
    place = "tokens"

    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=512)] | None = None
    add_special_tokens: bool | None = None

    def turns(self) -> Iterator[tuple[str, Turn]]:
        """Yield its messages."""
        for number, message in enumerate(self.messages or []):
            yield f"messages.{number}", message
