"""What harvesting adds to forwards: `python -m benchmarks.workbench.harvest`.

Three arms from the same conversations, interleaved in one run: bare forwards, forwards with
hooks that do nothing, and a harvest to memory-mapped shards on disk. Throughput in response
and prompt tokens a second, padding not counted; ratios to the bare arm, medians over rounds.
Deleting the shards is not timed. The C library is told to keep what the arms free, or an arm is
the slower the more often it gives memory back to the system, which hides what harvesting costs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.card import card, write_results
from probes.activations.harvest import harvest_to
from probes.activations.teacher_forcing import encode_response, padded_batches
from probes.data.conversations import Conversation
from safe_decode import ProbeBundle
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site, n_features
from safe_decode.demo.embedded_pair import artefact
from safe_decode.loading import load_model
from safe_decode.typing import CausalLM, Tokenizer

LOG = logging.getLogger("benchmarks.workbench.harvest")


def conversations(model: CausalLM, count: int, tokens: int, seed: int) -> list[Conversation]:
    """Make responses of random ids: what is timed does not depend on what they say."""
    rng = np.random.default_rng(seed)
    vocab = int(model.config.vocab_size)
    return [
        Conversation(
            messages=({"role": "user", "content": "A question about lamps and boats."},),
            response="x",
            group=str(row),
            response_ids=tuple(
                rng.integers(0, vocab, size=int(rng.integers(tokens // 2, tokens + 1))).tolist()
            ),
        )
        for row in range(count)
    ]


def keep_freed_memory() -> bool:
    """Keep freed memory in this process; False where the C library is not GNU's."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_threshold, 2**25))


def time_arms(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    sites: Sequence[Site],
    *,
    rounds: int,
    tokens_per_batch: int,
    scratch: Path,
) -> dict[str, Any]:
    """Time the three arms and return throughputs and ratios."""
    n_tokens = sum(len(encode_response(tokenizer, row).ids) for row in rows)

    def bare() -> None:
        encoded = [encode_response(tokenizer, row) for row in rows]
        batches = padded_batches(model, encoded, tokens_per_batch=tokens_per_batch)
        with torch.inference_mode():
            for batch in batches:
                model(**batch.inputs)

    def hooked() -> None:
        anatomy = anatomy_of(model)
        handles = [
            anatomy.module(site.layer, site.kind).register_forward_hook(lambda *_: None)
            for site in sites
        ]
        bare()
        for handle in handles:
            handle.remove()

    def harvested() -> None:
        folder = Path(tempfile.mkdtemp(prefix="harvest-", dir=scratch))
        harvest_to(folder, model, tokenizer, rows, sites, tokens_per_batch=tokens_per_batch)

    bare()  # warm-up
    arms = {"bare": bare, "empty hooks": hooked, "harvest": harvested}
    seconds = _interleaved(arms, rounds, scratch)
    ratios = {
        name: median(b / s for b, s in zip(seconds["bare"], seconds[name], strict=True))
        for name in arms
    }
    return {
        "features": n_features(sites),
        "responses": len(rows),
        "tokens": n_tokens,
        "bare, tokens a second": round(n_tokens / median(seconds["bare"])),
        "empty hooks, of bare %": round(100 * ratios["empty hooks"], 1),
        "harvest, of bare %": round(100 * ratios["harvest"], 1),
        "target": ">= 85 %",
        "met": "yes" if ratios["harvest"] >= 0.85 else "no",
    }


def _interleaved(
    arms: Mapping[str, Callable[[], None]], rounds: int, scratch: Path
) -> dict[str, list[float]]:
    """Run the arms in turn, and return the seconds of each run; `scratch` is emptied between."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            begun = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - begun)
            for left in scratch.iterdir():
                shutil.rmtree(left)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write `results/harvest.jsonl`, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="default the embedded one")
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="harvest")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    name = arguments.model or artefact("aligned")
    loaded = load_model(name, device=arguments.device, dtype="float32")
    model = loaded.model
    anatomy = anatomy_of(model)
    width = tuple(range(anatomy.d_model))
    sets = {
        "every residual layer": tuple(
            Site(layer, "resid", width) for layer in range(len(anatomy.blocks))
        )
    }
    if arguments.model is None:
        sets["the bundle's units"] = ProbeBundle.load(artefact("bundle")).probe.sites
    rows = conversations(model, arguments.responses, arguments.tokens, seed=0)
    keeps_memory = keep_freed_memory()
    results = []
    for name, sites in sets.items():
        with tempfile.TemporaryDirectory(prefix="harvest-") as scratch:
            timed = time_arms(
                model,
                loaded.tokenizer,
                rows,
                sites,
                rounds=arguments.rounds,
                tokens_per_batch=arguments.tokens_per_batch,
                scratch=Path(scratch),
            )
        row = {"what": name, **timed}
        LOG.info("%s", json.dumps(row))
        results.append(row)
    facts = card(
        device=arguments.device,
        threads=torch.get_num_threads(),
        rounds=arguments.rounds,
        keeps_freed_memory=keeps_memory,
        parameters=sum(p.numel() for p in model.parameters()),
    )
    write_results(arguments.name, results, facts)


if __name__ == "__main__":
    main()
