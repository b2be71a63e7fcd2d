"""What clients may ask: the request bodies, field by field, and what is refused by name.

Knows OpenAI's and Anthropic's parameters. Does not know models or how they are answered. A
parameter that is known and not supported is refused unless it says what happens anyway; one
that is not known is refused too, so that nothing a client relies on is skipped in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ChatCompletionRequest",
    "OpenAIRequest",
    "CompletionRequest",
    "MessagesRequest",
    "ResponseFormat",
    "SafetyOptions",
    "StreamOptions",
]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
_Text = Annotated[str, Field(max_length=1_000_000)]


class SafetyOptions(BaseModel):
    """What one request may tighten; it can never loosen what the operator set.

    Attributes:
        alpha: A certified level with a threshold at most the operator's.
        redirect: Another redirect that guards.
        holdback_tokens: At least the operator's.
    """

    model_config = _STRICT

    alpha: float | None = Field(default=None, gt=0, lt=1)
    redirect: Literal["refuse", "rewind", "stop"] | None = None
    holdback_tokens: int | None = Field(default=None, ge=0, le=4096)


class StreamOptions(BaseModel):
    """What a stream holds besides its chunks."""

    model_config = _STRICT

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(BaseModel):
    """The form that is asked of the answer."""

    model_config = _STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class TextPart(BaseModel):
    """A part of a message; only text is guarded.

    `cache_control` is accepted and has no effect.
    """

    model_config = _STRICT

    type: Literal["text"]
    text: _Text
    cache_control: dict[str, Any] | None = None


class ChatMessage(BaseModel):
    """One message. A last one of the assistant is the beginning of the answer."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[TextPart], Field(max_length=256)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: _Text | None = None

    def as_text(self) -> str:
        """Return its text; a refusal of an earlier turn belongs to what was said, once."""
        if isinstance(self.content, list):
            said = "".join(part.text for part in self.content)
        else:
            said = self.content or ""
        refusal = self.refusal or ""
        return said if said.endswith(refusal) else said + refusal


class OpenAIRequest(BaseModel):
    """What both OpenAI endpoints take.

    `user`, `metadata`, `store`, `service_tier` and the like change no answer; they are
    accepted.
    """

    model_config = _STRICT

    model: Annotated[str, Field(max_length=512)]
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[str, Field(max_length=512)]
        | Annotated[list[str], Field(max_length=16, fail_fast=True)]
        | None
    ) = None
    max_tokens: int | None = Field(default=None, ge=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    user: Annotated[str, Field(max_length=4096)] | None = None
    safety: SafetyOptions | None = None
    return_token_ids: bool | None = None


class ChatCompletionRequest(OpenAIRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=512)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    metadata: Annotated[dict[str, str], Field(max_length=64)] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Accepted where they say what happens anyway; refused by name otherwise.
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    function_call: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None


class CompletionRequest(OpenAIRequest):
    """The body of /v1/completions."""

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=128)]
        | Annotated[list[int], Field(min_length=1, max_length=200_000, fail_fast=True)]
        | Annotated[
            list[Annotated[list[int], Field(min_length=1, max_length=200_000, fail_fast=True)]],
            Field(min_length=1, max_length=128, fail_fast=True),
        ]
    )
    logprobs: int | None = Field(default=None, ge=0, le=5)
    best_of: int | None = Field(default=None, ge=1)
    echo: bool | None = None
    suffix: str | None = None


class AnthropicMessage(BaseModel):
    """One message in Anthropic's shape."""

    model_config = _STRICT

    role: Literal["user", "assistant"]
    content: _Text | Annotated[list[TextPart], Field(max_length=256)]

    def as_text(self) -> str:
        """Return its text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class MessagesRequest(BaseModel):
    """The body of /v1/messages."""

    model_config = _STRICT

    model: Annotated[str, Field(max_length=512)]
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=512)]
    max_tokens: int = Field(ge=1)
    system: _Text | Annotated[list[TextPart], Field(max_length=64)] | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    stop_sequences: Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety: SafetyOptions | None = None
    return_token_ids: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    thinking: Any = None

    def system_text(self) -> str:
        """Return the system prompt, or nothing."""
        if self.system is None or isinstance(self.system, str):
            return self.system or ""
        return "".join(part.text for part in self.system)
