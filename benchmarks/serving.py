"""What serving costs and whether it holds: `python -m benchmarks.serving`.

Starts servers, each in a process of its own, and measures them over HTTP: many clients at the
same time, a third of them leaving at random; overload; the scores of responses against the
same tokens judged offline; throughput against the same server without hooks, probe and
monitor, the arms interleaved; SIGTERM under load. Correctness comes first: whatever is wrong,
lost or unguarded is counted. `--quick` is a look, not a result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx2

from benchmarks.card import card, write_results
from benchmarks.serving_client import (
    MODEL,
    Answer,
    Message,
    Tally,
    ask,
    conversations,
    expectations,
)
from benchmarks.serving_offline import largest_difference
from benchmarks.serving_process import Served, serving
from benchmarks.serving_proxy import chunk_times_ms

LOG = logging.getLogger("benchmarks.serving")


async def crowd(served: Served, *, n_clients: int, seconds: float, leaves: float) -> Tally:
    """Let clients ask for some time, a share of their requests leaving at random."""
    asked, tally = conversations()[:: 12 if seconds < 10 else 1], Tally()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=n_clients)
    async with httpx2.AsyncClient(base_url=served.address, timeout=120, limits=limits) as client:
        expected = await expectations(client, asked)
        deadline = time.monotonic() + seconds

        async def one(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < deadline:
                index = rng.randrange(len(asked))
                leave = rng.randrange(1, 12) if rng.random() < leaves else None
                try:
                    answer = await ask(client, asked[index], leave_after=leave)
                except httpx2.HTTPError:
                    tally.counts["lost"] += 1
                    continue
                if answer is None:
                    tally.counts["left"] += 1
                elif answer.status != 200:
                    kind = "refused" if answer.status > 0 else "refused_without_retry_after"
                    tally.counts[kind] += 1
                    await asyncio.sleep(rng.uniform(0.5, 2.0))
                else:
                    tally.add(answer, expected[index], served.bundle)

        await asyncio.gather(*(one(number) for number in range(n_clients)))
    return tally


def load(*, n_clients: int, seconds: float) -> dict[str, Any]:
    """Measure a crowd against one server with room for all."""
    with serving("--set", f"max_queue={n_clients}") as served:
        before = served.rss_mib()
        asyncio.run(crowd(served, n_clients=4, seconds=seconds / 10, leaves=1 / 3))
        warm = served.rss_mib()
        tally = asyncio.run(crowd(served, n_clients=n_clients, seconds=seconds, leaves=1 / 3))
        after = served.rss_mib()
    return {
        "study": "crowd",
        "clients": n_clients,
        "seconds": seconds,
        **_counted(tally),
        "ttft_p50_ms": _quantile_ms(tally.ttft_s, 0.5),
        "ttft_p95_ms": _quantile_ms(tally.ttft_s, 0.95),
        "tokens_per_s": round(tally.tokens / seconds, 1),
        "rss_start_mib": before,
        "rss_warm_mib": warm,
        "rss_end_mib": after,
    }


def overload(*, n_clients: int, seconds: float) -> dict[str, Any]:
    """Measure a crowd against a server whose queue is short."""
    with serving("--set", "max_queue=8", "--set", "max_batch=4") as served:
        tally = asyncio.run(crowd(served, n_clients=n_clients, seconds=seconds, leaves=0.0))
    return {"study": "overload", "clients": n_clients, "seconds": seconds, **_counted(tally)}


def offline(*, n_responses: int) -> dict[str, Any]:
    """Compare the scores of responses with the same tokens judged offline, in one forward."""

    async def collect(served: Served) -> list[tuple[list[Message], Answer]]:
        asked = conversations()
        async with httpx2.AsyncClient(base_url=served.address, timeout=120) as client:
            gate = asyncio.Semaphore(16)

            async def one(number: int) -> tuple[list[Message], Answer]:
                messages = asked[number % len(asked)]
                async with gate:
                    answer = await ask(client, messages)
                assert answer is not None and answer.status == 200
                return messages, answer

            return await asyncio.gather(*(one(number) for number in range(n_responses)))

    with serving("--expose-scores") as served:
        answers = asyncio.run(collect(served))
    differences = [largest_difference(m, a.said, a.scores) for m, a in answers]
    return {
        "study": "offline",
        "responses": len(differences),
        "within_1e-3": sum(d <= 1e-3 for d in differences),
        "largest_difference": max(differences),
    }


def throughput(*, n_clients: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Compare a server with the same one without hooks, probe and monitor, interleaved."""
    rates: dict[str, list[float]] = {"guarded": [], "unguarded": []}
    with serving() as guarded, serving(is_bare=True) as bare:
        for _ in range(rounds):
            for name, served in (("guarded", guarded), ("unguarded", bare)):
                rates[name].append(asyncio.run(_rate(served, n_clients, seconds)))
    ratios = [a / b for a, b in zip(rates["guarded"], rates["unguarded"], strict=True)]
    return {
        "study": "throughput",
        "clients": n_clients,
        "rounds": rounds,
        "guarded_tokens_per_s": round(statistics.median(rates["guarded"]), 1),
        "unguarded_tokens_per_s": round(statistics.median(rates["unguarded"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "worst_ratio": round(min(ratios), 3),
    }


async def _rate(served: Served, n_clients: int, seconds: float) -> float:
    # Benign prompts alone: what trips says other words, and fewer.
    asked = [m for m in conversations() if m[-1]["role"] == "user"][:40]
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=n_clients)
    began, tokens = time.monotonic(), 0
    async with httpx2.AsyncClient(base_url=served.address, timeout=120, limits=limits) as client:

        async def one(number: int) -> int:
            said, at = 0, number
            while time.monotonic() < began + seconds:
                answer = await ask(client, asked[at % len(asked)])
                said += 0 if answer is None else len(answer.tokens)
                at += 7
            return said

        tokens = sum(await asyncio.gather(*(one(number) for number in range(n_clients))))
    return tokens / (time.monotonic() - began)


def proxy(*, n_answers: int, rounds: int) -> dict[str, Any]:
    """Measure what the proxy adds to a chunk."""
    with serving() as served:
        times = chunk_times_ms(served, n_answers=n_answers, rounds=rounds)
    ordered = sorted(times)
    return {
        "study": "proxy",
        "chunks": len(times),
        "median_ms": round(statistics.median(times), 4),
        "p99_ms": round(ordered[int(0.99 * len(ordered))], 4),
    }


def ending(*, n_clients: int) -> dict[str, Any]:
    """Tell a busy server to end, and count the streams that got their end."""

    async def main(served: Served) -> list[Answer | None | BaseException]:
        asked = conversations()
        async with httpx2.AsyncClient(base_url=served.address, timeout=60) as client:
            tasks = [asyncio.create_task(ask(client, asked[i])) for i in range(n_clients)]
            await asyncio.sleep(0.5)
            served.terminate()
            return await asyncio.gather(*tasks, return_exceptions=True)

    with serving() as served:
        answers = asyncio.run(main(served))
        code = served.wait()
    ends = Counter(
        a.finish_reason or f"refused {abs(a.status)}" if isinstance(a, Answer) else "lost"
        for a in answers
    )
    return {"study": "sigterm", "clients": n_clients, "exit": code, **dict(sorted(ends.items()))}


def _flat(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write one row a measure, since studies measure different things."""
    return [
        {"study": row["study"], "measure": name.replace("_", " "), "value": value}
        for row in rows
        for name, value in row.items()
        if name != "study"
    ]


def _counted(tally: Tally) -> dict[str, int]:
    names = ("answers", "left", "wrong", "lost", "unguarded", "refused")
    return {
        **{name: tally.counts[name] for name in names},
        "refused_without_retry_after": tally.counts["refused_without_retry_after"],
    }


def _quantile_ms(values: Sequence[float], share: float) -> float | None:
    ordered = sorted(values)
    if not ordered:
        return None
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--quick", action="store_true", help="some seconds each; not a result")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    LOG.setLevel(logging.INFO)
    quick = given.quick
    n, seconds = (16, 8.0) if quick else (given.clients, given.seconds)
    rows = []
    studies: list[Callable[[], dict[str, Any]]] = [
        lambda: load(n_clients=n, seconds=seconds),
        lambda: overload(n_clients=n, seconds=min(seconds, 30.0)),
        lambda: offline(n_responses=24 if quick else 500),
        lambda: throughput(n_clients=16, seconds=min(seconds, 20.0), rounds=2 if quick else 7),
        lambda: proxy(n_answers=8 if quick else 40, rounds=4 if quick else 20),
        lambda: ending(n_clients=n),
    ]
    for measure in studies:
        rows.append(measure())
        LOG.info("%s", json.dumps(rows[-1]))
    if not quick:
        write_results("serving", _flat(rows), card(model=MODEL))


if __name__ == "__main__":
    main()
