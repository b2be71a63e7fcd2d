"""What the guard costs a server, what the proxy adds, and whether scores are the offline ones."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from benchmarks.serving.client import StreamedAnswer, ask, client_of
from benchmarks.serving.offline import largest_difference
from benchmarks.serving.oracle import TOLERANCE, Expected, expected
from benchmarks.serving.process import Served, serving
from benchmarks.serving.proxy import chunk_times_ms

__all__ = ["offline", "proxy", "throughput"]


def offline(scale: float) -> dict[str, Any]:
    """500 responses: scores against one offline forward, decisions against SafeDecoder."""
    n_responses, right = max(8, round(500 * scale)), expected(max(scale, 0.05))

    async def collect(served: Served) -> list[tuple[Expected, StreamedAnswer]]:
        async with client_of(served.address, 16) as client:
            gate = asyncio.Semaphore(16)

            async def one(number: int) -> tuple[Expected, StreamedAnswer]:
                own = right[number % len(right)]
                async with gate:
                    return own, await ask(client, own.messages)

            return await asyncio.gather(*(one(number) for number in range(n_responses)))

    with serving("--expose-scores") as served:
        answers = asyncio.run(collect(served))
    differences = [
        largest_difference(own.messages, answer.said, answer.scores) for own, answer in answers
    ]
    same = [answer.action == own.action and answer.text == own.text for own, answer in answers]
    within = sum(
        is_same and difference <= TOLERANCE
        for is_same, difference in zip(same, differences, strict=True)
    )
    return {
        "responses": n_responses,
        "tripped": sum(own.action != "released" for own, _ in answers),
        "scores": sum(len(answer.scores) for _, answer in answers),
        "within_law_2": within,
        "same_text_and_decision": sum(same),
        "largest_difference": max(differences),
        "missed": "" if within == n_responses else "within_law_2",
    }


def throughput(scale: float) -> dict[str, Any]:
    """Benign tokens a second against the same server without the guard, many rounds by turns."""
    seconds, rounds = max(2.0, 15 * scale), max(2, round(17 * scale))
    n_clients = max(4, round(16 * scale))
    # Benign answers alone: what trips says other words, and fewer.
    asked = [own for own in expected(max(scale, 0.05)) if own.action == "released"]
    rates: dict[str, list[float]] = {"guarded": [], "unguarded": []}
    # As a public server is run: told scores would cost the guarded arm alone.
    flags = ("--hide-scores", "--set", "expose_bare=false")
    with serving(*flags) as guarded, serving(*flags, is_bare=True) as bare:
        arms = [("guarded", guarded), ("unguarded", bare)]
        for served in (guarded, bare):
            asyncio.run(_rate(served, asked, n_clients, seconds / 4))
        for number in range(rounds):
            for name, served in arms if number % 2 == 0 else reversed(arms):
                rates[name].append(asyncio.run(_rate(served, asked, n_clients, seconds)))
        guard_s = guarded.metric("safe_decode_guard_seconds_sum")
        step_s = guarded.metric("safe_decode_step_seconds_sum")
    ratios = [a / b for a, b in zip(rates["guarded"], rates["unguarded"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "clients": n_clients,
        "rounds": rounds,
        "guarded_tokens_per_s": round(statistics.median(rates["guarded"]), 1),
        "unguarded_tokens_per_s": round(statistics.median(rates["unguarded"]), 1),
        "ratio": round(ratio, 3),
        "worst_ratio": round(min(ratios), 3),
        "guard_share_by_metrics": round(guard_s / step_s, 4),
        "missed": "" if ratio >= 0.97 else "ratio",
    }


async def _rate(served: Served, asked: list[Expected], n_clients: int, seconds: float) -> float:
    began = time.monotonic()
    async with client_of(served.address, n_clients) as client:

        async def one(number: int) -> int:
            said, at = 0, number
            while time.monotonic() < began + seconds:
                said += len((await ask(client, asked[at % len(asked)].messages)).tokens)
                at += 7
            return said

        tokens = sum(await asyncio.gather(*(one(number) for number in range(n_clients))))
    return tokens / (time.monotonic() - began)


def proxy(scale: float) -> dict[str, Any]:
    """What the proxy adds to a chunk: taken, held back and written again."""
    with serving() as served:
        times = chunk_times_ms(
            served, n_answers=max(4, round(40 * scale)), rounds=max(3, round(20 * scale))
        )
    ordered = sorted(times)
    p99 = ordered[int(0.99 * len(ordered))]
    return {
        "chunks": len(times),
        "median_ms": round(statistics.median(times), 4),
        "p99_ms": round(p99, 4),
        "missed": "" if p99 < 1 else "p99_ms",
    }
