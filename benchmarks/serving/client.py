"""A client as measurements need it: it streams, looks closely, and may leave at any time.

Knows our chunks and what a stream says of itself. Does not know what is right, or servers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from safe_decode.demo.embedded_pair import artefact
from safe_decode.demo.scenes import read_prompts
from safe_decode.serving.middleware.gate import MARKER

__all__ = ["MODEL", "StreamedAnswer", "Message", "ask", "client_of", "conversations"]

MODEL = "safe-decode-embedded"
Message = dict[str, str]


@dataclass
class StreamedAnswer:
    """One streamed response as its client saw it.

    Attributes:
        text: Content and refusal, in order.
        refusal: Of it, what followed a trip.
        action: What the last chunk says became of it.
        bundle: Of the certificate in the last chunk.
        marker: Of the header.
        finish_reason: Of the last chunk.
        chunk_ids: Every `id` its chunks carried; one, if nobody else's came among them.
        tokens: Ids of all that was shown.
        said: Ids of the model's own tokens before a trip.
        scores: The statistic of each of `said`; None where none was told.
        counted: Shown tokens, by the usage chunk.
        has_done: Whether `[DONE]` came.
        has_left: Whether the client left before the end.
        ttft_s: Seconds to the first shown text.
        status: HTTP status, negative if a refusal had no Retry-After.
        began: When it was asked for, on a monotonic clock.
    """

    text: str = ""
    refusal: str = ""
    action: str | None = None
    bundle: str | None = None
    marker: str | None = None
    finish_reason: str | None = None
    chunk_ids: set[str] = field(default_factory=set)
    tokens: list[int] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    counted: int | None = None
    has_done: bool = False
    has_left: bool = False
    ttft_s: float | None = None
    status: int = 200
    began: float = field(default_factory=time.perf_counter)


def conversations() -> list[list[Message]]:
    """Return the held-out prompts, supplied beginnings as a last message of the assistant."""
    return [
        [
            *({"role": m["role"], "content": m["content"]} for m in prompt.messages),
            *([{"role": "assistant", "content": prompt.prefill}] if prompt.prefill else []),
        ]
        for prompt in read_prompts(artefact("prompts.jsonl"))
    ]


def client_of(address: str, n_clients: int) -> httpx2.AsyncClient:
    """Open a client with room for so many connections."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=n_clients)
    return httpx2.AsyncClient(base_url=address, timeout=120, limits=limits)


async def ask(
    client: httpx2.AsyncClient,
    messages: Sequence[Message],
    *,
    leave_after: int | None = None,
    answer: StreamedAnswer | None = None,
) -> StreamedAnswer:
    """Stream one answer.

    Args:
        client: Where to.
        messages: The conversation.
        leave_after: Leave after this many chunks.
        answer: Filled in place, for whoever wants to see what a broken stream had said.

    Raises:
        httpx2.HTTPError: The connection broke.
    """
    answer = StreamedAnswer() if answer is None else answer
    body = {
        "model": MODEL,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        answer.marker = response.headers.get(MARKER)
        if response.status_code != 200:
            await response.aread()
            wait = response.headers.get("retry-after")
            answer.status = response.status_code if wait else -response.status_code
            return answer
        n_chunks = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                answer.has_done = True
                continue
            _take(answer, json.loads(line[6:]))
            n_chunks += 1
            if leave_after is not None and n_chunks >= leave_after:
                answer.has_left = True
                return answer
    return answer


def _take(answer: StreamedAnswer, chunk: dict[str, Any]) -> None:
    answer.chunk_ids.add(chunk["id"])
    if not chunk["choices"]:
        answer.counted = chunk["usage"]["completion_tokens"]
        return
    choice = chunk["choices"][0]
    delta, safety = choice["delta"], choice.get("safety") or {}
    refusal = delta.get("refusal") or ""
    said = delta.get("content") or refusal
    if said and answer.ttft_s is None:
        answer.ttft_s = time.perf_counter() - answer.began
    answer.text += said
    answer.refusal += refusal
    answer.tokens += choice.get("token_ids", [])
    if delta.get("content"):
        answer.said += choice.get("token_ids", [])
        answer.scores += [token["statistic"] for token in safety.get("tokens", [])]
    if choice["finish_reason"] is not None:
        answer.finish_reason = choice["finish_reason"]
        answer.action = safety.get("action")
        answer.bundle = (safety.get("certificate") or {}).get("bundle")
