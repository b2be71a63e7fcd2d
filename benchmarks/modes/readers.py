"""What a reader waits for: the first released token, and a redirect in a batch.

Bare and guarded calls are interleaved in one run, each round beginning with another arm; ratios
are taken inside a round. The machine should have nothing else to do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.modes.subjects import ModeSubject
from safe_decode.bench.statistics import interval_of
from safe_decode.streaming.events import Released
from safe_decode.streaming.openmp import release_workers
from safe_decode.testing.bundles import peaks

__all__ = ["first_token", "redirect_costs"]

TRIPS = 2


class _Stamps(StoppingCriteria):
    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(
        self, input_ids: torch.LongTensor, _scores: object, **_: object
    ) -> torch.BoolTensor:
        self.at.append(time.perf_counter())
        nobody = input_ids.new_zeros(input_ids.shape[0], dtype=torch.bool)
        return cast("torch.BoolTensor", nobody)


def first_token(
    measured: ModeSubject, holdbacks: Sequence[int], *, rounds: int
) -> list[dict[str, Any]]:
    """Time the first released token at each hold-back beside bare TTFT and k + 1 bare tokens.

    Both begin with the text of a request. The bare call runs in the reader's thread, which no
    reader of a stream has; a second bare arm runs in a thread made for it, as the streamers of
    transformers are used, and is told beside the first.
    """
    asked = measured.asked.of([len(measured.asked.prompts) - 1])
    new = max(holdbacks) + 9
    fixed: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    decoders = {k: measured.subject.decoder(holdback_tokens=k) for k in holdbacks}

    def generated(stamps: _Stamps) -> None:
        inputs = measured.inputs(asked)
        measured.subject.model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            stopping_criteria=StoppingCriteriaList([stamps]),
            **fixed,
        )

    def bare() -> tuple[float, float]:
        stamps, began = _Stamps(), time.perf_counter()
        generated(stamps)
        return _told(stamps, began)

    def bare_in_a_thread() -> tuple[float, float]:
        stamps, began = _Stamps(), time.perf_counter()
        release_workers()
        thread = threading.Thread(target=generated, args=(stamps,))
        thread.start()
        thread.join()
        return _told(stamps, began)

    def released(k: int) -> float:
        began = time.perf_counter()
        with decoders[k].stream(
            list(asked.prompts), prefill=list(asked.prefills), **fixed
        ) as stream:
            for event in stream:
                if isinstance(event, Released) and event.token_ids:
                    return time.perf_counter() - began
        raise RuntimeError("the stream ended and released nothing; raise the cap.")

    arms: dict[str, Callable[[], Any]] = {"bare": bare, "bare in a thread": bare_in_a_thread}
    arms |= {str(k): partial(released, k) for k in holdbacks}
    taken = _interleaved(arms, rounds)
    return [_first_token_row(measured.name, k, taken) for k in holdbacks]


def _first_token_row(
    model: str, holdback: int, taken: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """Set the times at one hold-back, seconds, beside those of both bare arms."""
    bound, threaded = (
        [first + (holdback + 1) * each for first, each in taken[arm]]
        for arm in ("bare", "bare in a thread")
    )
    mine = taken[str(holdback)]
    ratio = interval_of([a / b for a, b in zip(mine, bound, strict=True)])
    beside = interval_of([a / b for a, b in zip(mine, threaded, strict=True)])
    return {
        "what": f"time to the first released token, hold-back {holdback}",
        "model": model,
        "n": len(mine),
        "ms": round(1000 * median(mine), 3),
        "bare TTFT + (k + 1) tokens, ms": round(1000 * median(bound), 3),
        "ratio": round(ratio.point, 4),
        "95 % interval": ratio.as_list(4),
        "ratio to bare in a fresh thread": round(beside.point, 4),
        "target": "<= 1.05",
        "met": "yes" if ratio.point <= 1.05 else "no",
    }


def _told(stamps: _Stamps, began: float) -> tuple[float, float]:
    """Return seconds to the first token, and of each further one."""
    at = stamps.at
    return at[0] - began, (at[-1] - at[0]) / (len(at) - 1)


def redirect_costs(measured: ModeSubject, *, rounds: int) -> list[dict[str, Any]]:
    """Compare rewind with a canned refusal, in tokens and ms, where two rows of a batch trip."""
    asked, decoder = measured.asked, measured.subject.decoder
    options: dict[str, Any] = {
        "prefill": list(asked.prefills),
        "max_new_tokens": measured.new_tokens,
        "do_sample": False,
    }
    tops = sorted(peaks(decoder(redirect="flag").generate(list(asked.prompts), **options)))
    threshold = (tops[-TRIPS] + tops[-TRIPS - 1]) / 2
    guards = {
        "flag": decoder(threshold, redirect="flag"),
        "refuse": decoder(threshold, redirect="refuse"),
        "rewind": decoder(threshold, redirect="rewind"),
    }
    last: dict[str, Any] = {}

    def timed(name: str) -> float:
        began = time.perf_counter()
        last[name] = guards[name].generate(list(asked.prompts), **options)
        return time.perf_counter() - began

    taken = _interleaved({name: partial(timed, name) for name in guards}, rounds)
    rows = []
    for name in guards:
        ends = [trace.end for trace in last[name].traces]
        ratio = interval_of([a / b for a, b in zip(taken[name], taken["refuse"], strict=True)])
        rows.append(
            {
                "what": f"batch {len(ends)}, {TRIPS} trips: {name}",
                "model": measured.name,
                "n": rounds,
                "tripped": sum(end.trip_step is not None for end in ends),
                "tries": sum(end.tries for end in ends),
                "tokens": sum(end.released_tokens + end.dropped_tokens for end in ends),
                "ms": round(1000 * median(taken[name]), 2),
                "times refuse": round(ratio.point, 3),
                "95 % interval": ratio.as_list(3),
            }
        )
    return rows


def _interleaved(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    for act in arms.values():
        act()
    taken: dict[str, list[Any]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(arms[name]())
    return taken
