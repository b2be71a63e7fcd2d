"""What the proxy adds to a chunk: real chunks, taken, held back and written again."""

from __future__ import annotations

import json
import time

import httpx2

from benchmarks.serving.client import MODEL, conversations
from benchmarks.serving.process import Served
from safe_decode.serving.middleware.gate import MARKER
from safe_decode.serving.proxy.openai_relay import Relay
from safe_decode.serving.proxy.requests import CHAT, ProxiedAsk

__all__ = ["chunk_times_ms"]


def chunk_times_ms(served: Served, *, n_answers: int, rounds: int) -> list[float]:
    """Time each chunk of some answers on its way through a relay.

    Args:
        served: Where the chunks come from.
        n_answers: Answers asked for.
        rounds: How often they are relayed; the first round is warm-up and left out.

    Returns:
        Milliseconds, one a chunk and round.
    """
    answers = [_chunks(served, messages) for messages in conversations()[:n_answers]]
    times = []
    for number in range(rounds):
        for mark, chunks in answers:
            ask = ProxiedAsk(CHAT, {}, MODEL, is_stream=True)
            relay = Relay(ask, bundle=mark, holdback_tokens=4)
            for chunk in chunks:
                began = time.perf_counter()
                for shown in relay.take(chunk):
                    json.dumps(shown, ensure_ascii=False, separators=(",", ":")).encode()
                if number:
                    times.append(1000 * (time.perf_counter() - began))
    return times


def _chunks(served: Served, messages: list[dict[str, str]]) -> tuple[str, list[bytes]]:
    body = {"model": MODEL, "messages": messages, "stream": True, "return_token_ids": True}
    url = f"{served.address}/v1/chat/completions"
    answer = httpx2.post(url, json=body, timeout=120)
    lines = answer.content.split(b"\n")
    mark = answer.headers[MARKER]
    return mark, [line[6:] for line in lines if line.startswith(b"data: {")]
