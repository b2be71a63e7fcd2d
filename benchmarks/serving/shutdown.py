"""How things end: SIGTERM and kill -9 under load, and an engine that fails in mid-stream."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.serving.client import StreamedAnswer, ask, client_of
from benchmarks.serving.oracle import Expected, expected, verdict_of
from benchmarks.serving.process import Failure, Served, serving

__all__ = ["failure", "killed", "terminated"]

Ending = tuple[int, StreamedAnswer, bool]
"""Index of a conversation, what its client saw, and whether the connection broke."""


async def _asked_until(
    served: Served, right: Sequence[Expected], n_clients: int, act: Callable[[], None]
) -> list[Ending]:
    """Let clients ask again and again; act while they do; return every answer they began."""
    seen: list[Ending] = []
    is_over = False
    async with client_of(served.address, n_clients) as client:

        async def one(number: int) -> None:
            rng = random.Random(number)
            while not is_over:
                index = rng.randrange(len(right))
                answer = StreamedAnswer()
                try:
                    await ask(client, right[index].messages, answer=answer)
                except httpx2.HTTPError:
                    seen.append((index, answer, True))
                    return
                seen.append((index, answer, False))
                if answer.status != 200:
                    return

        tasks = [asyncio.create_task(one(number)) for number in range(n_clients)]
        await asyncio.to_thread(act)
        is_over = True
        await asyncio.gather(*tasks)
    return seen


def terminated(scale: float) -> dict[str, Any]:
    """SIGTERM while 200 clients stream: every stream that began gets its proper end."""
    n_clients = max(4, round(200 * scale))
    right = expected(max(scale, 0.05))

    def act() -> None:
        time.sleep(max(1.0, 10 * scale))
        served.terminate()
        time.sleep(0.5)  # who asks now is refused, or finds nobody

    with tempfile.TemporaryDirectory() as folder:
        audit = Path(folder) / "audit.jsonl"
        with serving("--set", f"max_queue={n_clients}", "--audit", str(audit)) as served:
            seen = asyncio.run(_asked_until(served, right, n_clients, act))
            code = served.wait()
        corrupt, lines = _corrupt(audit)
    counts: Counter[str] = Counter()
    for index, answer, is_broken in seen:
        counts[_word(index, answer, is_broken, right, served.bundle)] += 1
    row = {
        "clients": n_clients,
        "exit": code,
        **{name: counts[name] for name in ("right", "cut", "refused", "not_begun")},
        "broken": counts["broken"],
        "wrong": counts["wrong"],
        "audit_lines": lines,
        "corrupt_lines": corrupt,
    }
    bad = [name for name in ("exit", "broken", "wrong", "corrupt_lines") if row[name]]
    return {**row, "missed": ", ".join(bad)}


def killed(scale: float) -> dict[str, Any]:
    """Kill -9 while 200 clients stream, at ten random times, and a restart on the same files."""
    n_clients, rounds = max(4, round(200 * scale)), max(1, round(10 * scale))
    right = expected(max(scale, 0.05))
    rng, counts = random.Random(0), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        audit = Path(folder) / "audit.jsonl"
        flags = ("--set", f"max_queue={n_clients}", "--audit", str(audit))
        for _ in range(rounds):
            with serving(*flags) as served:

                def act(server: Served = served) -> None:
                    time.sleep(rng.uniform(0.5, 3.0))
                    server.kill()

                seen = asyncio.run(_asked_until(served, right, n_clients, act))
            for index, answer, is_broken in seen:
                counts[_word(index, answer, is_broken, right, served.bundle)] += 1
        left = len(audit.read_text(encoding="utf-8").splitlines())
        with serving(*flags) as served:
            again = asyncio.run(_alone(served, right[0]))
            counts[f"after_{verdict_of(again, 0, right, served.bundle)}"] += 1
        corrupt, lines = _corrupt(audit)
    row = {
        "clients": n_clients,
        "kills": rounds,
        **{name: counts[name] for name in ("right", "broken", "not_begun", "wrong")},
        "right_after_restart": counts["after_right"],
        "lines_written_after_restart": lines - left,
        "corrupt_lines": corrupt,
    }
    # What was being written as the process died may be cut; no line after it may be.
    bad = [name for name in ("wrong",) if row[name]]
    bad += ["corrupt_lines"] if corrupt > rounds else []
    bad += [] if counts["after_right"] and lines - left >= 1 else ["restart"]
    return {**row, "missed": ", ".join(bad)}


def failure(scale: float) -> dict[str, Any]:
    """One of every 97 forwards raises, or yields NaN: rows close, others and the server go on."""
    n_clients, seconds = max(4, round(32 * scale)), max(3.0, 60 * scale)
    right = expected(max(scale, 0.05))
    row: dict[str, Any] = {"clients": n_clients, "seconds": seconds}
    bad: list[str] = []
    kinds: tuple[Failure, ...] = ("raise", "nan")
    for kind in kinds:
        with serving(failing=kind) as served:
            seen = asyncio.run(_asked_until(served, right, n_clients, lambda: time.sleep(seconds)))
            alarms = served.metric("safe_decode_guard_failures_total")
            ready = httpx2.get(f"{served.address}/readyz").status_code == 200
        words = Counter(_failed_word(*one, right, served.bundle) for one in seen)
        row |= {f"{kind}_{word}": words[word] for word in ("right", "closed", "wrong", "broken")}
        row[f"{kind}_alarms"] = int(alarms)
        bad += [f"{kind}_{word}" for word in ("wrong", "broken") if words[word]]
        bad += [] if ready else [f"{kind}: not ready"]
        bad += [] if alarms == words["closed"] > 0 else [f"{kind}_alarms"]
    return {**row, "missed": ", ".join(bad)}


async def _alone(served: Served, one: Expected) -> StreamedAnswer:
    async with client_of(served.address, 1) as client:
        return await ask(client, one.messages)


def _word(
    index: int, answer: StreamedAnswer, is_broken: bool, right: Sequence[Expected], bundle: str
) -> str:
    """Say how one answer of a server that was ended came out, in a word."""
    if answer.status in (429, 503):
        return "refused"
    if is_broken and not answer.chunk_ids:
        return "not_begun"
    if is_broken:
        # What it had said must still be how the right answer begins.
        return "broken" if right[index].text.startswith(answer.text) else "wrong"
    if answer.has_done and answer.action == "cut":
        return "cut" if right[index].text.startswith(answer.text) else "wrong"
    return "right" if verdict_of(answer, index, right, bundle) == "right" else "wrong"


def _failed_word(
    index: int, answer: StreamedAnswer, is_broken: bool, right: Sequence[Expected], bundle: str
) -> str:
    if is_broken or not answer.has_done or answer.status != 200:
        return "broken"
    if answer.action == "closed":
        kept = answer.text.removesuffix(answer.refusal)
        ends_well = answer.finish_reason == "content_filter"
        return "closed" if ends_well and right[index].text.startswith(kept) else "wrong"
    return "right" if verdict_of(answer, index, right, bundle) == "right" else "wrong"


def _corrupt(audit: Path) -> tuple[int, int]:
    """Count lines that are no JSON, and all lines."""
    lines, corrupt = audit.read_text(encoding="utf-8").splitlines(), 0
    for line in lines:
        try:
            json.loads(line)
        except ValueError:
            corrupt += 1
    return corrupt, len(lines)
