"""How long the event loop is held while a hostile but legal body is read.

The application runs in this process, around an engine that encodes with a tokenizer of 2,000
control tokens and answers at once, so that reading is all that is left. Beside each request a
heartbeat on the same loop notes by how much it comes late; the first arm is nobody's request and
says what the machine alone does. What is reported is the smallest of some repeats of the longest
delay of each: other processes only ever add to it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from safe_decode.certificate import Certificate, Envelope
from safe_decode.certificate_choice import CertificateChoice
from safe_decode.demo.embedded_pair import artefact
from safe_decode.engines.interface import GuardFacts
from safe_decode.engines.rows import Row
from safe_decode.engines.transformers.batch.prompts import PromptReader
from safe_decode.serving.app import create_app
from safe_decode.serving.settings import ServeSettings
from safe_decode.streaming.events import Finished
from safe_decode.typing import Tokenizer

__all__ = ["loop_hold"]

_TARGET_MS = 50.0
_CONTROL_TOKENS = 2_000
_BEAT_S = 0.001
_LIMIT = 1_000_000
"""The server's own limit of a body."""


class _ReadingEngine:
    """Reads prompts as the guarded engine does and answers nothing."""

    def __init__(self, tokenizer: Tokenizer, context_tokens: int | None) -> None:
        envelope = Envelope(64, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)
        certificate = Certificate.compute(
            [0.0] * 1_000, alpha=0.01, delta=0.05, population="benign", envelope=envelope
        )
        self.facts = GuardFacts(
            bundle="0" * 64,
            choice=CertificateChoice((certificate,), "benign", None),
            alpha=0.01,
            redirect="refuse",
            holdback_tokens=4,
            heads=("harm",),
            context_tokens=context_tokens,
            vocab_tokens=len(tokenizer),
        )
        self._prompts = PromptReader(
            tokenizer, context_tokens=context_tokens, vocab_tokens=len(tokenizer)
        )
        self.chat, self.completion = self._prompts.chat, self._prompts.completion

    def token_text(self, token: int) -> str:
        return str(token)

    def admits(self, rows: Sequence[Row], row: Row) -> bool:
        del rows, row
        return True

    def run(self, rows: Sequence[Row]) -> None:
        for row in rows:
            row.emit(Finished("stop", outcome="released"))

    def has_changed(self) -> bool:
        return False

    def check(self) -> float:
        return 0.0

    def close(self) -> None:
        """Hold nothing."""


def _tokenizer() -> Tokenizer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artefact("unaligned"))
    tokenizer.model_max_length = 10**9  # its warning is no part of what is measured
    tokenizer.add_tokens([f"<|extra_{i}|>" for i in range(_CONTROL_TOKENS)], special_tokens=True)
    return tokenizer


def _of_parts(messages: int) -> list[dict[str, Any]]:
    """Return messages of as many parts as one may have."""
    return [
        {"role": "user", "content": [{"type": "text", "text": "a"}] * 256} for _ in range(messages)
    ]


def bodies(scale: float) -> Mapping[str, tuple[str, Any]]:
    """Return the path and the body of each shape, as large as the limit times `scale`."""
    room = round(0.95 * _LIMIT * scale)

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    def fill(text: str) -> str:
        return text * (room // len(text.encode()))

    some = said("a")
    chat, raw, messages = "/v1/chat/completions", "/v1/completions", "/v1/messages"
    return {
        "one message": (chat, {"messages": said(fill("word and more text "))}),
        "one prefill": (
            chat,
            {"messages": [*some, {"role": "assistant", "content": fill("word and more text ")}]},
        ),
        "anthropic message": (
            messages,
            {"messages": said(fill("word and more text ")), "max_tokens": 5},
        ),
        "control tokens": (chat, {"messages": said(fill("<|extra_7|>"))}),
        "nearly control tokens": (chat, {"messages": said(fill("<|"))}),
        "one control token": (chat, {"messages": said(fill("<|") + "<|extra_7|>")}),
        "raw text": (raw, {"prompt": fill("word and more text ")}),
        "raw ids": (raw, {"prompt": [40] * min(200_000, room // 3)}),
        "many messages": (
            chat,
            {"messages": [said("x y " * (room // 1_800 // 4))[0] for _ in range(512)]},
        ),
        "many parts": (chat, {"messages": _of_parts(max(1, min(10, room // 8_000)))}),
        "too many parts": (chat, {"messages": _of_parts(max(1, room // 7_500))}),
        "logit_bias": (
            chat,
            {"messages": some, "logit_bias": {str(i): 1.0 for i in range(1_024)}},
        ),
        "stop strings": (chat, {"messages": some, "stop": ["a" * 512] * 4}),
        "unknown fields": (
            chat,
            {"messages": some, **{f"f{i}": 0 for i in range(room // 12)}},
        ),
        "lists": (raw, {"prompt": [[]] * (room // 3)}),
        "wrong ids": (raw, {"prompt": [[True] * min(200_000, room // 5)]}),
        "deep": (chat, "[" * room),
    }


async def _held_ms(client: httpx2.AsyncClient, request: tuple[str, bytes] | None) -> float:
    """Return the longest delay of a heartbeat while a request is answered."""
    worst, is_over = 0.0, False

    async def beat() -> None:
        nonlocal worst
        while not is_over:
            began = time.perf_counter()
            await asyncio.sleep(_BEAT_S)
            worst = max(worst, time.perf_counter() - began - _BEAT_S)

    beating = asyncio.create_task(beat())
    await asyncio.sleep(0.02)
    worst = 0.0
    if request is None:
        await asyncio.sleep(0.3)
    else:
        path, body = request
        answer = await client.post(path, content=body, headers={"content-type": "application/json"})
        if answer.status_code >= 500:
            raise RuntimeError(f"{path} answered {answer.status_code}, which measures nothing")
    await asyncio.sleep(0.02)
    is_over = True
    await beating
    return 1000 * worst


async def _measure(scale: float, context_tokens: int | None, repeats: int) -> dict[str, float]:
    engine = _ReadingEngine(_tokenizer(), context_tokens)
    settings = ServeSettings.model_validate({"served_name": "reading", "max_choices": 8})
    app = create_app(engine, settings)
    requests: dict[str, tuple[str, bytes] | None] = {"nothing": None}
    for name, (path, body) in bodies(scale).items():
        raw = body if isinstance(body, str) else json.dumps({"model": "reading", **body})
        requests[name] = (path, raw.encode())
    held: dict[str, list[float]] = {name: [] for name in requests}
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=600
        ) as client:
            for _ in range(repeats):
                for name, request in requests.items():
                    gc.collect()
                    held[name].append(await _held_ms(client, request))
    return {name: round(min(times), 1) for name, times in held.items()}


def loop_hold(scale: float) -> dict[str, Any]:
    """The longest time that reading a hostile but legal body holds the event loop."""
    repeats = max(1, round(5 * scale))
    row: dict[str, Any] = {"control_tokens": _CONTROL_TOKENS, "repeats": repeats}
    contexts = {"": 1_024, "_long_context": 131_072}
    worst: dict[str, float] = {}
    for suffix, context in contexts.items():
        held = asyncio.run(_measure(scale, context, repeats))
        worst |= {f"{name}{suffix}": ms for name, ms in held.items()}
    row |= {f"{name.replace(' ', '_')}_ms": ms for name, ms in worst.items()}
    bad = [name for name, ms in worst.items() if ms > _TARGET_MS]
    return {**row, "missed": ", ".join(bad)}
