"""Rounds: every arm once a round, in rotating order, in one run.

Knows how arms are interleaved, warmed up and checked, and what else is read beside the clock:
memory and waits. Does not know statistics or files.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from safe_decode.bench.arms import Arm, Clock, Lap, Load, arms_of, options_of
from safe_decode.bench.models import Subject
from safe_decode.bench.statistics import figures_of
from safe_decode.errors import ConfigurationError

__all__ = ["beside", "interleaved", "ladder_rows", "live_bytes", "undisturbed"]

Tick = Callable[[int], None]


def interleaved(
    arms: Mapping[str, Arm],
    options: dict[str, Any],
    *,
    rounds: int,
    clock: Clock = "wall",
    tick: Tick = lambda _: None,
) -> dict[str, list[Lap]]:
    """Run every arm once a round, each round beginning with another arm.

    Args:
        arms: By name.
        options: For `generate`.
        rounds: At least 2, after one that warms up and is not kept.
        clock: How time is read.
        tick: Told of each call.

    Raises:
        ConfigurationError: Too few rounds for an interval.
    """
    if rounds < 2:
        raise ConfigurationError(f"rounds={rounds} give no interval; pass at least 2.")
    names = list(arms)
    laps: dict[str, list[Lap]] = {name: [] for name in names}
    for name in names:
        arms[name].lap(options, clock)
        tick(1)
    for number in range(rounds):
        turn = number % len(names)
        with undisturbed():
            for name in names[turn:] + names[:turn]:
                laps[name].append(arms[name].lap(options, clock))
                tick(1)
    return laps


def ladder_rows(
    subject: Subject,
    load: Load,
    *,
    rounds: int,
    only: tuple[str, ...] = (),
    tick: Tick = lambda _: None,
) -> list[dict[str, object]]:
    """Measure the ladder: a row an arm.

    Args:
        subject: Model and bundle.
        load: Batch, context, length.
        rounds: See `interleaved`.
        only: Arms beside "bare"; empty for all.
        tick: Told of each call.
    """
    arms = arms_of(subject, load)
    if only:
        arms = {name: arm for name, arm in arms.items() if name in ("bare", *only)}
    options, device = options_of(subject, load), subject.model.device
    same_ids = _same_ids(subject, arms_of(subject, replace(load, batch=1))["guard"], options)
    # In half precision the largest scores may tie, and the kernel chooses; `same_ids` tells.
    if not same_ids and subject.model.dtype == torch.float32:
        raise ConfigurationError(
            f"subject={subject.name!r} yields other ids under the guard; this is a defect, and "
            "its cost means nothing. Please report it."
        )
    laps = interleaved(arms, options, rounds=rounds, clock=load.clock, tick=tick)
    figures = figures_of(laps, batch=load.batch)
    noted = beside(arms, options, load, device)
    facts = {
        **subject.facts(),
        "vocab": subject.model.config.get_text_config().vocab_size,
        "mode": load.mode,
        "batch": load.batch,
        "context": load.context,
        "new_tokens": load.new_tokens,
        "clock": load.clock,
        "same_ids": same_ids,
    }
    return [{**facts, **row, **noted[str(row["arm"])]} for row in figures]


def _same_ids(subject: Subject, guard: Arm, options: dict[str, Any]) -> bool:
    """Correctness first: say whether what is timed is what the bare model says.

    Compiled and in half precision, graphs with and without taps may round differently.
    """
    short = {**options, "max_new_tokens": 4, "min_new_tokens": 4}
    bare = subject.model.generate(**short)
    guarded: Any = guard.call(**short)
    return torch.equal(bare, guarded.sequences)


def beside(
    arms: Mapping[str, Arm], options: dict[str, Any], load: Load, device: torch.device
) -> dict[str, dict[str, object]]:
    """Read memory, and waits where there is an accelerator, in calls that are not timed.

    Args:
        arms: By name; one is "bare".
        options: For `generate`.
        load: Of the calls.
        device: Where they run.

    Returns:
        For each arm, KiB held and waits a step beyond "bare"; None where nothing can wait.
    """
    held = {name: _held_bytes(arm, options, load, device) for name, arm in arms.items()}
    waits = {name: _waits(arm, options, device) for name, arm in arms.items()}
    bare = waits["bare"]
    return {
        name: {
            "added_kib": round((held[name] - held["bare"]) / 1024, 1),
            "added_waits_per_step": None
            if bare is None
            else round(((waits[name] or 0) - bare) / load.new_tokens, 3),
        }
        for name in arms
    }


def live_bytes() -> int:
    """Sum the storages of all tensors that are alive on the Python side."""
    gc.collect()
    with warnings.catch_warnings():
        # Looking at every object touches deprecated attributes of foreign ones.
        warnings.simplefilter("ignore")
        # Other subclasses hold other tensors, or, while graphs are traced, nothing at all.
        tensors = [found for found in gc.get_objects() if type(found) in (Tensor, Parameter)]
    sizes = {}
    for tensor in tensors:
        if tensor.layout == torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _held_bytes(arm: Arm, options: dict[str, Any], load: Load, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        arm.call(**options)
        return torch.cuda.max_memory_allocated(device)
    seen: list[int] = []

    def criterion(ids: Tensor, _scores: object, **_kwargs: object) -> Tensor:
        if ids.shape[1] == load.context + max(2, load.new_tokens // 2):
            seen.append(live_bytes())
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    arm.call(**options, stopping_criteria=[criterion])
    return seen[-1]


def _waits(arm: Arm, options: dict[str, Any], device: torch.device) -> int | None:
    """Count the host's waits for the accelerator in one call; None without one."""
    if device.type != "cuda":
        return None
    with arm.within():
        return _waits_within(arm, options)


def _waits_within(arm: Arm, options: dict[str, Any]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            arm.run(**options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the collector of cycles out of a round; it would strike one arm of many."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
