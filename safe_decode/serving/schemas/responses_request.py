"""The body of OpenAI's responses endpoint: instructions, and input as text or as messages.

Knows its fields, and items as SDKs write and hand them back. Does not know models or answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from safe_decode.serving.schemas.messages import LENIENT, Text, Turn
from safe_decode.serving.schemas.requests import (
    RequestBody,
    SafetyOptions,
    StreamOptions,
    documented,
)

__all__ = ["InputItem", "ResponsesRequest"]


class InputItem(Turn):
    """An item of the input; only messages are read.

    Attributes:
        type: What it is.
        role: Of a message.
    """

    type: Annotated[str, Field(max_length=64)] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None


class ReasoningOptions(BaseModel):
    """How much is thought before the answer."""

    model_config = LENIENT

    effort: Annotated[str, Field(max_length=32)] | None = None


class TextFormat(BaseModel):
    """The form that is asked of the text."""

    model_config = LENIENT

    type: Literal["text", "json_object", "json_schema"]


class TextOptions(BaseModel):
    """What is asked of the text."""

    model_config = LENIENT

    format: TextFormat | None = None


class ResponsesRequest(RequestBody):
    """The body of /v1/responses."""

    model_config = documented("responses")
    place = "responses"

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=512)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=1_000_000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    safety: SafetyOptions | None = None

    def turns(self) -> Iterator[tuple[str, Turn]]:
        """Yield its messages; other items have no role."""
        if isinstance(self.input, list):
            for number, item in enumerate(self.input):
                if item.role is not None:
                    yield f"input.{number}", item

    def spoken(self) -> list[dict[str, str]]:
        """Return roles and texts, the instructions first; of its items, those with a role."""
        said: list[dict[str, str]] = []
        if self.instructions:
            said.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*said, {"role": "user", "content": self.input}]
        for item in self.input:
            if item.role is not None:
                role = "system" if item.role == "developer" else item.role
                said.append({"role": role, "content": item.as_text()})
        return said
