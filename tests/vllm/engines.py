"""Engines of vLLM in forked processes, and every score that their guard consumes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from tests.vllm.toys import Toy

T = TypeVar("T")

IS_V2 = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "block_size": 32,
    "num_gpu_blocks_override": 64,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "seed": 0,
    "disable_log_stats": True,
}
"""An engine in this process, with a cache of 2,048 positions; prompts come in chunks of 64."""


def forked(job: Callable[..., T], *given: object, **environ: str) -> T:
    """Run a job in a forked process, with variables of its own, and return what it returns.

    Raises:
        AssertionError: It has raised; the message is its traceback.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        os.environ.update(ENVIRON | environ)
        warnings.simplefilter("ignore")
        try:
            there.send((True, job(*given)))
        except BaseException:
            there.send((False, traceback.format_exc()))

    process = context.Process(target=run)
    gc.collect()
    process.start()
    there.close()
    try:
        is_good, result = here.recv()
    except EOFError:
        is_good, result = False, "the process ended without an answer"
    process.join()
    assert is_good, result
    return result


def refused(job: Callable[..., object], *given: object, **environ: str) -> str:
    """Run a job that must raise, and return what it has said."""
    try:
        forked(job, *given, **environ)
    except AssertionError as error:
        return str(error)
    raise AssertionError("nothing was refused")


ENVIRON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


def start(toy: Toy, **options: object):
    """Start an engine; guarded if SAFE_DECODE_BUNDLE is set."""
    from vllm import LLM
    from vllm.model_executor.models import registry

    # The registry looks at a class in a process of its own, which imports vLLM once more.
    registry._run_in_subprocess = lambda look: look()
    llm = LLM(str(toy.model), **{**SMALL, **options})
    assert llm.llm_engine.vllm_config.use_v2_model_runner is IS_V2
    return llm


def runtime(llm):
    """The guard of an engine in this process."""
    from safe_decode.engines.vllm.runtime import runtime_of

    return runtime_of(llm.llm_engine.vllm_config)


class Consumed:
    """Every score that the guard of an engine consumes.

    Attributes:
        scores: By prompt, lists of (position, score); one a request, in order.
        n_partial: Rows that were judged in the middle of their prompt.
        n_cached: Positions that were judged and not read in the same forward.
        n_resumed: Rows that came back.
    """

    def __init__(self, llm) -> None:
        guard = runtime(llm)
        self.scores: dict = defaultdict(list)
        self.n_partial = self.n_cached = self.n_resumed = 0
        self._at: dict[int, list] = {}
        join, step = guard.join, guard.judge.step

        def joined(key, prompt, params, n_known):
            n_before = len(guard._seats._gone)
            seat = join(key, prompt, params, n_known)
            if len(guard._seats._gone) < n_before and n_known > len(prompt):
                self.n_resumed += 1
            else:
                self._at[seat] = []
                self.scores[tuple(prompt)].append(self._at[seat])
            return seat

        def stepped(rows, slots, tokens):
            import torch

            counts, first = guard.judge.due_positions(rows), guard.judge.consumed[rows.seats]
            for i, (seat, n, start) in enumerate(zip(rows.seats, counts, first, strict=True)):
                positions = torch.arange(int(start), int(start + n))
                found = slots._scores[rows.only(i).slots(positions[None])[0]]
                self._at[int(seat)] += zip(positions.tolist(), found[:, 0].tolist(), strict=True)
                self.n_partial += not rows.is_whole[i]
                self.n_cached += max(0, int(n) - int(rows.in_forward[i]))
            return step(rows, slots, tokens)

        guard.join, guard.judge.step = joined, stepped
