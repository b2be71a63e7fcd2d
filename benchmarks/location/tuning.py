"""A fine-tuning run as a curve: what is measured every so many steps.

Knows a plain AdamW loop, freezing and what is read off. Does not know arms or pairs.
The loop is plain rather than a Trainer's, so that a run of seconds is not mostly set-up.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from probes.data.conversations import Conversation
from probes.finetuning.finetune import encode_for_training, pad_batch
from probes.finetuning.freeze import UnitFreeze
from safe_decode.loading import Loaded

__all__ = ["TuningRun", "tune"]


@dataclass(frozen=True, kw_only=True)
class TuningRun:
    """How one run trains.

    Attributes:
        steps: Of the optimizer.
        every: Steps between readings.
        rate: Peak learning rate, after a short warm-up falling along a cosine.
        batch: Conversations a step.
        seed: Of the order.
        autocast: Run forwards in mixed bfloat16; weights and steps stay as they are.
    """

    steps: int
    every: int
    rate: float
    batch: int = 16
    seed: int = 0
    autocast: bool = False


def tune(
    loaded: Loaded,
    conversations: Sequence[Conversation],
    run: TuningRun,
    read: Callable[[], dict[str, Any]],
    *,
    freeze: UnitFreeze | None = None,
    stop: Callable[[dict[str, Any]], bool] | None = None,
) -> list[dict[str, Any]]:
    """Train in place and return the readings, the one before the first step included.

    Args:
        loaded: The model, changed in place.
        conversations: Read in random order, again and again.
        run: See `TuningRun`.
        read: Called in eval mode; what it returns stands in the curve.
        freeze: Held still; None for nothing.
        stop: Told each reading; True ends the run.
    """
    model: Any = loaded.model
    pad = loaded.tokenizer.pad_token_id or 0
    rows = encode_for_training(model, loaded.tokenizer, conversations, max_length=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, run.steps))
    curve = [{"step": 0, **read()}]
    batches = _batches(rows, run.batch, random.Random(run.seed))
    with nullcontext() if freeze is None else freeze.applied(model, optimizer):
        for step in range(1, run.steps + 1):
            model.train()
            batch = {k: v.to(model.device) for k, v in pad_batch(next(batches), pad).items()}
            with torch.autocast(model.device.type, torch.bfloat16, enabled=run.autocast):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            model.eval()
            if step % run.every == 0 or step == run.steps:
                curve.append({"step": step, **read()})
                if stop is not None and stop(curve[-1]):
                    break
    return curve


def _batches(
    rows: Sequence[dict[str, list[int]]], size: int, rng: random.Random
) -> Iterator[list[dict[str, list[int]]]]:
    """Yield batches of like length for ever, each pass in a new order."""
    while True:
        order = sorted(rows, key=lambda row: len(row["input_ids"]) + 8 * rng.random())
        batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
        rng.shuffle(batches)
        yield from batches


def _rate(step: int, steps: int) -> float:
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
