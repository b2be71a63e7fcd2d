"""What it costs a call to see that the model is still the one.

Run: `python -m benchmarks.cost.unchanged`.

Times `SafeDecoder.require_unchanged` where nothing has moved, and the fingerprint that follows
where something has, on the embedded model and on one with the modules and the parameters of a
model of half a billion parameters, all of them narrow: the check reads a few values of each
parameter, so that their number counts and their size does not. Time of the thread's own, so that
neighbours on a shared machine do not count; medians.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.card import card, write_results
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.bundle.seal import ModelSeal
from safe_decode.demo.embedded_pair import embedded
from safe_decode.typing import CausalLM, Tokenizer

LOG = logging.getLogger("benchmarks.cost.unchanged")
_NARROW = Qwen2Config(
    vocab_size=1_000,
    hidden_size=56,
    intermediate_size=128,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
)


def median_us(call: Callable[[], object], repeats: int) -> float:
    """Return the median of a call's time on its thread, in microseconds."""
    call()
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        taken.append(1e6 * (time.thread_time() - start))
    return round(statistics.median(taken), 1)


def row_of(name: str, model: CausalLM, tokenizer: Tokenizer, repeats: int) -> dict[str, Any]:
    """Time both on one model."""
    fingerprint = Fingerprint.of(model, tokenizer)
    seal = ModelSeal(model, tokenizer, fingerprint)
    return {
        "model": name,
        "modules": sum(1 for _ in model.modules()),
        "parameters": sum(1 for _ in model.parameters()),
        "check us": median_us(seal.require, repeats),
        "fingerprint us": median_us(lambda: Fingerprint.of(model, tokenizer), repeats // 20),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Time, write `results/unchanged.jsonl`, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--name", default="unchanged")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    parts = embedded()
    narrow: Any = AutoModelForCausalLM.from_config(_NARROW)  # type: ignore[no-untyped-call]
    models = {"embedded": parts.model, "24 blocks of Qwen2, narrow": narrow.eval()}
    rows = []
    for name, model in models.items():
        rows.append(row_of(name, model, parts.tokenizer, arguments.repeats))
        LOG.info("%s", json.dumps(rows[-1]))
    write_results(arguments.name, rows, card(repeats=arguments.repeats))


if __name__ == "__main__":
    main()
