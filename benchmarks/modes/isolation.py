"""Sessions that do not see each other, and calls that leave nothing behind.

Two threads and two sessions on *one* model, strangers' forwards in between; then many calls,
some cancelled, some failed: hooks and memory are compared with before.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.modes.subjects import ModeSubject
from safe_decode.streaming.threads import IDLE_NAME
from safe_decode.typing import CausalLM

__all__ = ["churn", "isolated"]

_PAGE_KIB = 4
FLAT_KIB = 4096
"""What memory may grow by over the whole run: allocator noise of a process of some 400 MiB."""


def isolated(measured: ModeSubject, *, rounds: int) -> dict[str, Any]:
    """Compare two decoders in two threads on one model, unguarded calls between, with solo runs."""
    model, asked = measured.subject.model, measured.asked
    limits = (measured.middle, measured.middle - 0.05)
    decoders = [
        measured.subject.decoder(threshold, redirect="refuse", holdback_tokens=k)
        for k, threshold in enumerate(limits)
    ]

    def call(which: int, seed: int) -> list[Any]:
        output = decoders[which].generate(
            list(asked.prompts),
            prefill=list(asked.prefills),
            max_new_tokens=measured.new_tokens,
            do_sample=True,
            seed=seed,
        )
        return list(output.traces)

    solo = [[call(which, seed) for seed in range(rounds)] for which in range(2)]
    found: list[list[Any]] = [[], []]

    def run(which: int) -> None:
        found[which] = [call(which, seed) for seed in range(rounds)]

    ids = measured.inputs().input_ids

    def stray() -> None:
        with torch.no_grad():
            model(input_ids=ids)

    _run_beside([lambda: run(0), lambda: run(1)], stranger=stray)
    traces = [
        (mine, theirs)
        for a, b in zip(found, solo, strict=True)
        for one, other in zip(a, b, strict=True)
        for mine, theirs in zip(one, other, strict=True)
    ]
    same = sum(mine == theirs for mine, theirs in traces)
    return {
        "what": "two threads, two sessions, one model, a stranger between: traces equal to solo",
        "model": measured.name,
        "n": len(traces),
        "measured": same,
        "target": "all",
        "met": "yes" if same == len(traces) else "no",
    }


def _run_beside(works: Sequence[Callable[[], None]], *, stranger: Callable[[], None]) -> None:
    """Run each work in a thread of its own, and the stranger again and again until all end.

    Raises:
        BaseException: The first that any of them raised.
    """
    failures: list[BaseException] = []
    over = threading.Event()

    def again() -> None:
        while not over.is_set():
            stranger()

    def caught(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=caught, args=(work,)) for work in works]
    beside = threading.Thread(target=caught, args=(again,))
    for thread in (*threads, beside):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    beside.join()
    if failures:
        raise failures[0]


class _Fails(LogitsProcessor):
    def __init__(self, after: int) -> None:
        self._left = after

    def __call__(self, _ids: object, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._left -= 1
        if self._left < 0:
            raise ZeroDivisionError("the user's own processor")
        return scores


def churn(measured: ModeSubject, *, calls: int, cancelled: int, failed: int) -> dict[str, Any]:
    """Generate many times, some streams left early, some calls failing; see what is left behind.

    Args:
        measured: On a machine whose memory is read from /proc.
        calls: All of them.
        cancelled: Streams that are left after their first event.
        failed: Calls in which a processor of the user's raises.
    """
    model, asked = measured.subject.model, measured.asked
    decoder = measured.subject.decoder(measured.middle, redirect="rewind")
    before = _hooks(model)
    rows = len(asked.prompts)
    stride_c, stride_f = calls // max(cancelled, 1), calls // max(failed, 1)
    counts = {"finished": 0, "cancelled": 0, "failed": 0}
    warm, points = calls // 5, list[int]()

    def one(number: int) -> str:
        row = number % rows
        prompt, prefill = asked.prompts[row], asked.prefills[row]
        given: dict[str, Any] = {"prefill": [prefill], "max_new_tokens": measured.new_tokens}
        if cancelled and number % stride_c == 1 and counts["cancelled"] < cancelled:
            with decoder.stream([prompt], **given) as stream:
                next(iter(stream))
            return "cancelled"
        if failed and number % stride_f == 2 and counts["failed"] < failed:
            try:
                # flag, and no early end: the row must live until its processor raises.
                decoder.generate(
                    [prompt],
                    **given,
                    min_new_tokens=4,
                    redirect="flag",
                    logits_processor=LogitsProcessorList([_Fails(3)]),
                )
            except ZeroDivisionError:
                return "failed"
        decoder.generate([prompt], **given, do_sample=bool(number % 2))
        return "finished"

    for number in range(calls):
        counts[one(number)] += 1
        if number + 1 == warm or (number + 1) % max(calls // 10, 1) == 0:
            points.append(_resident_kib())
    first, last = points[0 if warm >= calls // 10 else 1], points[-1]
    left = [hook for hook in _hooks(model) if hook not in before]
    threads = [t.name for t in threading.enumerate() if t.name not in ("MainThread", IDLE_NAME)]
    grown = last - min(points[: max(1, len(points) // 3)] + [first])
    found = {**counts, "hooks": len(left), "threads": len(threads), "KiB": grown}
    return {
        "what": "generations, cancelled and failed among them: hooks left, memory grown (KiB)",
        "model": measured.name,
        "n": calls,
        "measured": ", ".join(f"{n} {what}" for what, n in found.items()),
        "target": f"0 hooks, <= {FLAT_KIB} KiB after a fifth of them",
        "met": "yes" if not left and grown <= FLAT_KIB else "no",
    }


def _hooks(model: CausalLM) -> set[int]:
    return {
        id(hook)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    }


def _resident_kib() -> int:
    """Read resident memory; what the allocator keeps for later is given back first."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * _PAGE_KIB
