"""Slow and half-open connections beside honest streams: what those notice of them.

All on the loopback and from one address, which is the worst case: limits by address cannot tell
the slow ones from the honest ones. A connection that the server ends is opened again a second
later. The server's limits are its defaults.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from benchmarks.serving.client import ask, client_of
from benchmarks.serving.oracle import Expected, expected, verdict_of
from benchmarks.serving.process import Served, serving

__all__ = ["slow"]

_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
_KINDS = (
    b"",
    _HEAD + b"x-half: ",
    _HEAD + b"content-type: application/json\r\ncontent-length: 900\r\n\r\n{",
)
"""Nothing at all, headers without an end, a body without an end."""
_DRIP_SECONDS = 2.0
_TIMES = ("ttft", "total")
_TARGET = 1.5
"""Time to the first token and to the end may grow by this, as ratios of medians."""


@dataclass
class SlowTally:
    """What honest clients saw in one arm, over all rounds."""

    counts: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)

    def measures(self) -> dict[str, Any]:
        """Summarise, medians and 95th percentiles in milliseconds."""
        return {
            "right": self.counts["right"],
            "errors": self.counts["error"],
            "ttft_p50_ms": _ms(statistics.median(self.ttft_s)),
            "ttft_p95_ms": _ms(statistics.quantiles(self.ttft_s, n=20)[-1]),
            "total_p50_ms": _ms(statistics.median(self.total_s)),
            "total_p95_ms": _ms(statistics.quantiles(self.total_s, n=20)[-1]),
        }


def slow(scale: float) -> dict[str, Any]:
    """1,000 slow or half-open connections beside 20 honest streams, and without them, by turns."""
    n_slow, n_honest = max(40, round(1000 * scale)), max(4, round(20 * scale))
    seconds, rounds, right = max(2.0, 12 * scale), max(1, round(4 * scale)), expected(0.05)
    without, beside, opened = SlowTally(), SlowTally(), 0
    with serving() as served:
        asyncio.run(_honest(served, right, n_honest, seconds / 2, SlowTally()))
        for _ in range(rounds):
            asyncio.run(_honest(served, right, n_honest, seconds, without))
            opened += asyncio.run(_beside(served, right, n_honest, n_slow, seconds, beside))
        dropped = {
            why: served.metric(f'safe_decode_connections_dropped_total{{why="{why}"}}')
            for why in ("slow_headers", "crowded_out", "refused")
        }
    before, after = without.measures(), beside.measures()
    row = {
        "honest_streams": n_honest,
        "slow_connections": n_slow,
        "slow_connections_opened": opened,
        "rounds": rounds,
        "seconds": seconds,
        **{f"without_{name}": value for name, value in before.items()},
        **{f"beside_{name}": value for name, value in after.items()},
        **{f"ended_{why}": int(n) for why, n in dropped.items()},
    }
    ratios = {name: round(after[f"{name}_p50_ms"] / before[f"{name}_p50_ms"], 3) for name in _TIMES}
    missed = [name for name in _TIMES if ratios[name] > _TARGET]
    missed += [f"{arm}_errors" for arm in ("without", "beside") if row[f"{arm}_errors"]]
    return {
        **row,
        **{f"{name}_ratio": ratio for name, ratio in ratios.items()},
        "missed": ", ".join(missed),
    }


async def _beside(
    served: Served,
    right: list[Expected],
    n_honest: int,
    n_slow: int,
    seconds: float,
    tally: SlowTally,
) -> int:
    async with _standing(served.address, n_slow) as opened:
        # So long all of them take to come.
        await asyncio.sleep(seconds / 6)
        await _honest(served, right, n_honest, seconds, tally)
        return opened[0]


async def _honest(
    served: Served, right: list[Expected], n_clients: int, seconds: float, tally: SlowTally
) -> None:
    """Let honest clients ask for some time; each answer is compared with the right one."""
    deadline = time.monotonic() + seconds
    async with client_of(served.address, n_clients) as client:

        async def one(number: int) -> None:
            for turn in itertools.count():
                if time.monotonic() >= deadline:
                    return
                index = (number + 7 * turn) % len(right)
                try:
                    answer = await ask(client, right[index].messages)
                except httpx2.HTTPError:
                    tally.counts["error"] += 1
                    continue
                tally.total_s.append(time.perf_counter() - answer.began)
                if answer.ttft_s is not None:
                    tally.ttft_s.append(answer.ttft_s)
                is_right = answer.status == 200 and (
                    verdict_of(answer, index, right, served.bundle) == "right"
                )
                tally.counts["right" if is_right else "error"] += 1

        await asyncio.gather(*(one(number) for number in range(n_clients)))


@asynccontextmanager
async def _standing(address: str, n_slow: int) -> AsyncIterator[list[int]]:
    """Keep so many slow connections open; yields how many were opened until now."""
    host, port = address.removeprefix("http://").split(":")
    opened = [0]

    async def one(number: int) -> None:
        kind = _KINDS[number % len(_KINDS)]
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(host, int(port))
                opened[0] += 1
                try:
                    await _drip(reader, writer, kind)
                finally:
                    writer.close()
            await asyncio.sleep(1.0)

    tasks = [asyncio.ensure_future(one(number)) for number in range(n_slow)]
    try:
        yield opened
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: bytes) -> None:
    """Send a beginning, then a byte now and then, until the server ends the connection."""
    writer.write(kind)
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRIP_SECONDS):
                if not await reader.read(4096):
                    return
        if kind:
            writer.write(b" ")


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)
