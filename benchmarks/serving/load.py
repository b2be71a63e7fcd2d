"""Many clients at the same time, some of them leaving, with room for all and with too little."""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from benchmarks.serving.client import ask, client_of
from benchmarks.serving.oracle import Expected, expected, verdict_of
from benchmarks.serving.process import Served, serving

__all__ = ["crowd", "overload", "slope_per_minute"]

_FLAT = 0.02
"""Memory is flat if its slope, kept up for five minutes, adds at most this share."""
_BAD = ("wrong", "lost", "mixed_up", "unguarded")


@dataclass
class Tally:
    """What many clients saw together."""

    counts: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    tokens: int = 0


async def visit(
    served: Served,
    right: Sequence[Expected],
    *,
    n_clients: int,
    seconds: float,
    leaves: float,
) -> Tally:
    """Let clients ask for some time, a share of their requests leaving at random."""
    tally, deadline = Tally(), time.monotonic() + seconds
    async with client_of(served.address, n_clients) as client:

        async def one(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < deadline:
                index = rng.randrange(len(right))
                leave = rng.randrange(1, 12) if rng.random() < leaves else None
                try:
                    answer = await ask(client, right[index].messages, leave_after=leave)
                except httpx2.HTTPError:
                    tally.counts["lost"] += 1
                    continue
                if answer.status != 200:
                    tally.counts[_refusal(answer.status)] += 1
                    await asyncio.sleep(rng.uniform(0.5, 2.0))
                    continue
                tally.counts[verdict_of(answer, index, right, served.bundle)] += 1
                tally.tokens += len(answer.tokens)
                if answer.ttft_s is not None:
                    tally.ttft_s.append(answer.ttft_s)

        await asyncio.gather(*(one(number) for number in range(n_clients)))
    return tally


def crowd(scale: float) -> dict[str, Any]:
    """200 streaming clients for five minutes, a third leaving at random."""
    n_clients, seconds = max(4, round(200 * scale)), max(3.0, 300 * scale)
    right = expected(max(scale, 0.05))
    with serving("--set", f"max_queue={n_clients}") as served:
        asyncio.run(visit(served, right, n_clients=4, seconds=seconds / 10, leaves=1 / 3))
        with memory_of(served, every_s=max(0.1, seconds / 300)) as samples:
            tally = asyncio.run(
                visit(served, right, n_clients=n_clients, seconds=seconds, leaves=1 / 3)
            )
    steady = samples[len(samples) // 3 :]
    slope, rss = slope_per_minute(steady), statistics.fmean(mib for _, mib in steady)
    row = {
        "clients": n_clients,
        "seconds": seconds,
        **_counted(tally),
        "ttft_p50_ms": _quantile_ms(tally.ttft_s, 0.5),
        "ttft_p95_ms": _quantile_ms(tally.ttft_s, 0.95),
        "tokens_per_s": round(tally.tokens / seconds, 1),
        "rss_mib": round(rss, 1),
        "rss_slope_mib_per_minute": round(slope, 3),
    }
    bad = [name for name in (*_BAD, "refused_otherwise") if row[name]]
    if 5 * slope > _FLAT * rss and scale >= 1:
        bad.append("memory")
    return {**row, "missed": ", ".join(bad)}


def overload(scale: float) -> dict[str, Any]:
    """200 clients and a queue of eight rows: refused with 429 or 503 and Retry-After."""
    n_clients, seconds = max(24, round(200 * scale)), max(3.0, 60 * scale)
    right = expected(max(scale, 0.05))
    with serving("--set", "max_queue=8", "--set", "max_batch=4") as served:
        tally = asyncio.run(visit(served, right, n_clients=n_clients, seconds=seconds, leaves=0.0))
    row = {"clients": n_clients, "seconds": seconds, **_counted(tally)}
    bad = [name for name in (*_BAD, "refused_otherwise") if row[name]]
    return {**row, "missed": ", ".join(bad if row["refused"] else [*bad, "no overload"])}


@contextmanager
def memory_of(served: Served, *, every_s: float) -> Iterator[list[tuple[float, float]]]:
    """Collect seconds and resident MiB while the body runs."""
    samples: list[tuple[float, float]] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(every_s):
            samples.append((time.monotonic(), served.rss_mib()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


def slope_per_minute(samples: Sequence[tuple[float, float]]) -> float:
    """Fit a line by least squares to (seconds, value); at least two samples."""
    seconds, values = zip(*samples, strict=True)
    return 60 * statistics.linear_regression(seconds, values).slope


def _refusal(status: int) -> str:
    return "refused" if status in (429, 503) else "refused_otherwise"


def _counted(tally: Tally) -> dict[str, int]:
    names = ("right", "left", *_BAD, "refused", "refused_otherwise")
    return {name: tally.counts[name] for name in names}


def _quantile_ms(values: Sequence[float], share: float) -> float | None:
    ordered = sorted(values)
    if not ordered:
        return None
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)
