"""The set for an accelerator: `python -m benchmarks.gpu`; `--tiny` tries it out on the CPU.

A shape with random weights (default llama-3-8b in bfloat16: 16 GB), batch 1, 32 and 128, eager:
bare, hooks, monitor and guard in one interleaved run, with peak memory and the waits for the
device that each adds to a step; then the bare model compiled with a static cache and CUDA
graphs, beside what the guard says to that. Writes `results/gpu.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.card import card, write_results
from safe_decode.bench.figures import figures_of
from safe_decode.bench.ladder import Arm, Load, options_of
from safe_decode.bench.measure import interleaved, ladder_rows
from safe_decode.bench.subject import ProbeShape, Subject, of_shape
from safe_decode.errors import UnsupportedError

LOG = logging.getLogger("benchmarks.gpu")
ARMS = ("hooks", "monitor", "guard")


def compiled_rows(subject: Subject, load: Load, rounds: int) -> list[dict[str, Any]]:
    """Measure bare compiled generation, and guarded where it is supported.

    Where the guard refuses compiled generation, its row holds the refusal instead of figures.
    """
    options = {**options_of(subject, load), "cache_implementation": "static"}
    arms = {"bare": Arm("bare", subject.model.generate)}
    decoder, refused = subject.decoder(), None
    try:
        decoder.generate(**options)
    except UnsupportedError as error:
        refused = str(error)
    else:
        arms["guard"] = Arm("guard", decoder.generate)
    rows = figures_of(interleaved(arms, options, rounds=rounds), batch=load.batch)
    facts = {**subject.facts(), "mode": "compiled, static cache", "batch": load.batch}
    facts |= {"context": load.context, "new_tokens": load.new_tokens}
    done = [{**facts, **row} for row in rows]
    return done if refused is None else [*done, {**facts, "arm": "guard", "refused": refused}]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--features", type=int, default=4_096)
    parser.add_argument("--tiny", action="store_true", help="nano on the CPU; writes nothing")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if given.tiny:
        given.shape, given.dtype, given.batch, given.context = "nano", "float32", [1, 2], 8
        given.new_tokens, given.rounds, given.features = 4, 2, 16
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device; pass --tiny to try the script out on the CPU")
    device = "cpu" if given.tiny else "cuda"
    probe = ProbeShape(features=given.features)
    subject = of_shape(given.shape, probe=probe, device=device, dtype=given.dtype)
    rows: list[dict[str, Any]] = []
    for batch in given.batch:
        load = Load(batch, given.context, given.new_tokens)
        rows += ladder_rows(subject, load, rounds=given.rounds, only=ARMS)
        if not given.tiny:  # compiling takes longer than all the rest
            rows += compiled_rows(subject, load, given.rounds)
        for row in rows[-len(ARMS) - 1 :]:
            LOG.info("%s", json.dumps(row))
    if not given.tiny:
        write_results("gpu", rows, card())


if __name__ == "__main__":
    main()
