"""Messages of a conversation as clients write them: roles, and text in one piece or in parts.

Knows the shapes of OpenAI's and Anthropic's messages. Does not know what is done with a field
that stands beside role and text; the table of fields does.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["AnthropicMessage", "ChatMessage", "LENIENT", "Part", "STRICT", "Text", "Turn", "joined"]

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
"""Of objects whose every field counts."""
LENIENT = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)
"""Of objects whose other fields are kept until the table of fields decides about them."""

Text = Annotated[str, Field(max_length=1_000_000)]

_TEXTS = frozenset({"text", "input_text", "output_text"})


class Part(BaseModel):
    """A part of a message; only text is guarded.

    Attributes:
        type: What it is.
        text: Of a part of text.
        refusal: Of a part that refuses.
    """

    model_config = LENIENT

    type: Annotated[str, Field(max_length=64)]
    text: Text | None = None
    refusal: Text | None = None

    @property
    def is_read(self) -> bool:
        """Say whether a part of this type holds text."""
        return self.type in _TEXTS or self.type == "refusal"

    @property
    def said(self) -> str | None:
        """Return its text; None: it has none."""
        return self.refusal if self.type == "refusal" else self.text


Parts = Annotated[list[Part], Field(max_length=256)]


class Turn(BaseModel):
    """A message of one who speaks.

    Attributes:
        content: Text, or parts of text.
        refusal: Of an earlier turn; belongs to what was said.
    """

    model_config = LENIENT

    content: Text | Parts | None = None
    refusal: Text | None = None

    def as_text(self) -> str:
        """Return its text; a refusal of an earlier turn belongs to what was said, once."""
        said, refusal = joined(self.content), self.refusal or ""
        return said if said.endswith(refusal) else said + refusal


class ChatMessage(Turn):
    """One message. A last one of the assistant is the beginning of the answer."""

    role: Literal["system", "developer", "user", "assistant"]


class AnthropicMessage(Turn):
    """One message in Anthropic's shape."""

    role: Literal["user", "assistant"]
    content: Text | Parts


def joined(content: str | list[Part] | None) -> str:
    """Return the text of a message's content."""
    if isinstance(content, list):
        return "".join(part.said or "" for part in content)
    return content or ""
