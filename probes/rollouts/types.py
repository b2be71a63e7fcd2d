"""What is asked of a model, and how a judge answers: the words that rollouts share.

Knows requests, labels and verdicts as values. Does not know models or generation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from probes.data.conversations import Conversation, Message, Split

__all__ = ["Judge", "Label", "Request", "Verdict", "requests_of"]

Label = Literal["refusal", "benign", "harmful", "broken"]


class Verdict(Protocol):
    """What a judge says of a response."""

    @property
    def label(self) -> str:
        """One of `Label`."""

    @property
    def onset_char(self) -> int | None:
        """First character of the first harmful clause, where the response is harmful."""


Judge = Callable[[Sequence[Message], str], Verdict]
"""Called with the messages and the whole response, a prefill included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the model is asked.

    Attributes:
        messages: Up to and with the user's last turn.
        group: See `Conversation`.
        prefill: Text that the assistant's turn is made to begin with.
        prompt_harmful: Whether the request asks for harm.
        category: See `Conversation`.
        split: See `Conversation`.
        meta: Carried over to the conversation.
    """

    messages: tuple[Message, ...]
    group: str
    prefill: str | None = None
    prompt_harmful: bool | None = None
    category: str | None = None
    split: Split | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def requests_of(rows: Sequence[Conversation], *, samples: int = 1) -> list[Request]:
    """Make requests of prompts; a response they have is dropped, `meta["prefill"]` is kept."""
    requests = []
    for row in rows:
        prefill = row.meta.get("prefill")
        requests += [
            Request(
                messages=row.messages,
                group=row.group,
                prefill=None if prefill is None else str(prefill),
                prompt_harmful=row.prompt_harmful,
                category=row.category,
                split=row.split,
                meta=row.meta,
            )
        ] * samples
    return requests
