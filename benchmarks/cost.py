"""What re-checking costs: `python -m benchmarks.cost`.

Bare `generate` and guarded `generate` on the same held-out benign prompts, interleaved in one
run, a fixed number of new tokens, nothing tripping; ratios of times a token, medians over
rounds. Then the no-op law at work: rows beside tripping neighbours against bare `generate`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from itertools import islice
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.card import card, write_results
from probes.organism.grammar import Cells
from probes.organism.requests import Draw, draw
from safe_decode import ProbeBundle, SafeDecoder
from safe_decode.chat import encode_batch, encode_chat
from safe_decode.demo.load import artefact, load_model
from safe_decode.taps import ActivationTap

LOG = logging.getLogger("benchmarks.cost")
NEW_TOKENS = 48


def _batch(decoder: SafeDecoder, rows: int, seed: int) -> Any:  # noqa: ANN401
    tokenizer = decoder.tokenizer
    one = Draw(situation="hard_negative", count=rows)
    requests = draw((one,), split="test", seed=seed, tokenizer=tokenizer, cells=Cells.unseen(0))
    chats = [encode_chat(tokenizer, request.messages) for request in requests]
    return encode_batch(tokenizer, chats, decoder.model.device)


def _timed(run: Any) -> float:  # noqa: ANN401
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def time_rows(decoder: SafeDecoder, batch_rows: int, rounds: int) -> dict[str, Any]:
    """Time bare, empty-hooked and guarded generation of the same tokens, interleaved."""
    batch = _batch(decoder, batch_rows, seed=5)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    fixed: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
    }
    tap = ActivationTap(decoder.model, decoder.bundle.probe.sites)

    def bare() -> None:
        decoder.model.generate(**inputs, **fixed)

    def hooked() -> None:
        with tap.installed():
            decoder.model.generate(**inputs, **fixed)

    def guarded() -> None:
        # flag: the guard's whole path, with no row leaving it however long the answers grow
        decoder.generate(**inputs, **fixed, redirect="flag")

    arms = {"bare": bare, "hooks": hooked, "guarded": guarded}
    for run in arms.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        names = list(arms)
        for name in names[number % 3 :] + names[: number % 3]:
            times[name].append(_timed(arms[name]))
    ratios = [g / b for g, b in zip(times["guarded"], times["bare"], strict=True)]
    hooks = [h / b for h, b in zip(times["hooks"], times["bare"], strict=True)]
    low, high = quantiles(ratios, n=20)[0], quantiles(ratios, n=20)[-1]
    bare_ms = 1000 * median(times["bare"]) / NEW_TOKENS
    ratio = median(ratios)
    return {
        "what": f"time a token, batch {batch_rows}",
        "n": rounds,
        "bare ms": round(bare_ms, 3),
        "empty hooks / bare": round(median(hooks), 4),
        "guarded / bare, median": round(ratio, 4),
        "5th to 95th percentile": [round(low, 3), round(high, 3)],
        "target": "<= 1.05",
        "met": "yes" if ratio <= 1.05 else "no",
    }


def identical_rows(decoder: SafeDecoder, n_batches: int) -> dict[str, Any]:
    """Compare untripped rows beside tripping neighbours with bare `generate`, id by id."""
    tokenizer, model = decoder.tokenizer, decoder.model
    kinds = (
        Draw(situation="benign", count=8 * n_batches),
        Draw(situation="hard_negative", count=8 * n_batches),
        Draw(situation="prefilled", count=8 * n_batches, depth_tokens=16),
    )
    pools = [
        draw((kind,), split="test", seed=8, tokenizer=tokenizer, cells=Cells.unseen(0))
        for kind in kinds
    ]
    sources = [iter(pool) for pool in pools]
    same = untripped = tripped = 0
    for _ in range(n_batches):
        requests = [request for source in sources for request in islice(source, 8)]
        messages = [list(request.messages) for request in requests]
        prefills = [request.prefill for request in requests]
        output = decoder.generate(messages, prefill=prefills, max_new_tokens=64, do_sample=False)
        chats = [
            encode_chat(tokenizer, request.messages, prefill=request.prefill)
            for request in requests
        ]
        batch = encode_batch(tokenizer, chats, model.device)
        bare = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=64,
            do_sample=False,
        )
        width = batch.input_ids.shape[1]
        for row, trace in enumerate(output.traces):
            if trace.tripped:
                tripped += 1
                continue
            untripped += 1
            mine = [
                i for i in output.sequences[row, width:].tolist() if i != tokenizer.pad_token_id
            ]
            theirs = [i for i in bare[row, width:].tolist() if i != tokenizer.pad_token_id]
            same += mine == theirs
    return {
        "what": f"ids of untripped rows beside {tripped} tripping ones, identical to bare",
        "n": untripped,
        "bare ms": None,
        "empty hooks / bare": None,
        "guarded / bare, median": None,
        "5th to 95th percentile": f"{100 * same / untripped:.2f} % identical",
        "target": "100 %",
        "met": "yes" if same == untripped and tripped else "no",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write `results/cost.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batches", type=int, default=20)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = load_model(artefact("aligned"))
    decoder = SafeDecoder(loaded.model, loaded.tokenizer, ProbeBundle.load(artefact("bundle")))
    rows = []
    for batch_rows in (1, 32):
        rows.append(time_rows(decoder, batch_rows, arguments.rounds))
        LOG.info("%s", json.dumps(rows[-1]))
    rows.append(identical_rows(decoder, arguments.batches))
    LOG.info("%s", json.dumps(rows[-1]))
    write_results("cost", rows, card(threads=torch.get_num_threads(), new_tokens=NEW_TOKENS))


if __name__ == "__main__":
    main()
