"""A client as measurements need it: it streams, looks closely, and may leave at any time.

Knows our chunks and what a correct answer says. Does not know servers or what is measured.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from safe_decode.demo.load import artefact
from safe_decode.demo.scenes import read_prompts

__all__ = ["MODEL", "Answer", "Message", "Tally", "ask", "conversations", "expectations"]

MODEL = "safe-decode-embedded"
Message = dict[str, str]


@dataclass
class Answer:
    """One streamed response as its client saw it."""

    text: str = ""
    action: str | None = None
    bundle: str | None = None
    finish_reason: str | None = None
    ttft_s: float | None = None
    tokens: list[int] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    status: int = 200


@dataclass
class Tally:
    """What many clients saw together."""

    counts: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    tokens: int = 0

    def add(self, answer: Answer, expected: str, bundle: str) -> None:
        """Count an answer that was read to its end."""
        self.counts["answers"] += 1
        self.tokens += len(answer.tokens)
        if answer.ttft_s is not None:
            self.ttft_s.append(answer.ttft_s)
        if answer.finish_reason is None:
            self.counts["lost"] += 1
        elif answer.text != expected:
            self.counts["wrong"] += 1
        if answer.finish_reason is not None and (answer.action is None or answer.bundle != bundle):
            self.counts["unguarded"] += 1


def conversations() -> list[list[Message]]:
    """Return the held-out prompts, supplied beginnings as a last message of the assistant."""
    return [
        [
            *({"role": m["role"], "content": m["content"]} for m in prompt.messages),
            *([{"role": "assistant", "content": prompt.prefill}] if prompt.prefill else []),
        ]
        for prompt in read_prompts(artefact("prompts.jsonl"))
    ]


async def ask(
    client: httpx2.AsyncClient, messages: Sequence[Message], *, leave_after: int | None = None
) -> Answer | None:
    """Stream one answer; None if the client left after `leave_after` chunks."""
    body = {"model": MODEL, "messages": messages, "stream": True, "return_token_ids": True}
    answer, began = Answer(), time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            wait = response.headers.get("retry-after")
            answer.status = response.status_code if wait else -response.status_code
            return answer
        n_chunks = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            _take(answer, choice, time.perf_counter() - began)
            n_chunks += 1
            if leave_after is not None and n_chunks >= leave_after:
                return None
    return answer


def _take(answer: Answer, choice: dict[str, Any], elapsed_s: float) -> None:
    delta, safety = choice["delta"], choice.get("safety") or {}
    said = delta.get("content") or delta.get("refusal") or ""
    if said and answer.ttft_s is None:
        answer.ttft_s = elapsed_s
    answer.text += said
    answer.tokens += choice.get("token_ids", [])
    if delta.get("content"):
        answer.said += choice.get("token_ids", [])
        answer.scores += [token["statistic"] for token in safety.get("tokens", [])]
    if choice["finish_reason"] is not None:
        answer.finish_reason = choice["finish_reason"]
        answer.action = safety.get("action")
        answer.bundle = (safety.get("certificate") or {}).get("bundle")


async def expectations(client: httpx2.AsyncClient, asked: Sequence[list[Message]]) -> list[str]:
    """Ask each conversation alone: what every later answer is compared with."""
    texts = []
    for messages in asked:
        answer = await ask(client, messages)
        assert answer is not None and answer.finish_reason is not None
        texts.append(answer.text)
    return texts
