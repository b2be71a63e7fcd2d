"""The set for an accelerator: `python -m benchmarks.cost.gpu`; `--tiny` tries it out on the CPU.

A shape with random weights (default llama-3-8b in bfloat16: 16 GB), batch 1, 32 and 128, eager,
compiled with a static cache, and as CUDA graphs: bare, hooks, monitor and guard in one
interleaved run each, by the host's clock and the device's, with peak memory and the waits for
the device that each adds to a step. Writes `results/gpu.jsonl`.

`--tiny` measures nano, eager and compiled, and writes nothing; its graphs are traced and
captured as on a device, by a backend that needs no compiler (`--backend inductor` builds them).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.card import card, write_results
from safe_decode.bench.arms import Load
from safe_decode.bench.compile_modes import MODES, modes_of
from safe_decode.bench.models import ProbeShape, of_shape
from safe_decode.bench.runner import ladder_rows

LOG = logging.getLogger("benchmarks.cost.gpu")
ARMS = ("hooks", "monitor", "guard")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and write; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mode", default=",".join(MODES), help="by comma")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--features", type=int, default=4_096)
    parser.add_argument("--backend", help="of torch.compile; default inductor")
    parser.add_argument("--tiny", action="store_true", help="nano on the CPU; writes nothing")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    backend = given.backend or ("aot_eager" if given.tiny else "inductor")
    if given.tiny:
        given.shape, given.dtype, given.batch, given.context = "nano", "float32", [1, 2], 8
        given.new_tokens, given.rounds, given.features = 4, 2, 16
        given.mode = "eager,compiled"
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device; pass --tiny to try the script out on the CPU")
    device = "cpu" if given.tiny else "cuda"
    probe = ProbeShape(features=given.features)
    subject = of_shape(given.shape, probe=probe, device=device, dtype=given.dtype)
    rows: list[dict[str, Any]] = []
    for mode in modes_of(given.mode, device):
        for batch in given.batch:
            load = Load(batch, given.context, given.new_tokens, mode=mode, backend=backend)
            rows += ladder_rows(subject, load, rounds=given.rounds, only=ARMS)
            for row in rows[-len(ARMS) - 1 :]:
                LOG.info("%s", json.dumps(row))
    if not given.tiny:
        write_results("gpu", rows, card(backend=backend))
    return rows


if __name__ == "__main__":
    main()
