"""What re-checking costs: `python -m benchmarks.cost.per_token`.

Bare `generate` and guarded `generate` on the same held-out benign prompts, interleaved in one
run, a fixed number of new tokens, nothing tripping; ratios inside a round, medians over rounds:
of the time from one token to the next, and of the whole call, which holds the closing forward
that judges the last token of a row that is cut off. Then the no-op law at work: rows beside
tripping neighbours against bare `generate`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import torch

from benchmarks.card import card, write_results
from probes.organism.draws import Draw, draw
from probes.organism.grammar import Cells
from safe_decode import ProbeBundle, SafeDecoder
from safe_decode.activations.tap import ActivationTap
from safe_decode.bench.arms import Arm, Lap
from safe_decode.bench.runner import interleaved
from safe_decode.bench.statistics import interval_of
from safe_decode.demo.embedded_pair import artefact
from safe_decode.loading import load_model
from safe_decode.prompts.chat import ChatBatch, encode_batch, encode_chat

LOG = logging.getLogger("benchmarks.cost.per_token")
NEW_TOKENS = 48


def _batch(decoder: SafeDecoder, rows: int, seed: int) -> ChatBatch:
    tokenizer = decoder.tokenizer
    one = Draw(situation="hard_negative", count=rows)
    requests = draw((one,), split="test", seed=seed, tokenizer=tokenizer, cells=Cells.unseen(0))
    chats = [encode_chat(tokenizer, request.messages) for request in requests]
    return encode_batch(tokenizer, chats, decoder.model.device)


def time_rows(decoder: SafeDecoder, batch_rows: int, rounds: int) -> list[dict[str, Any]]:
    """Time bare, empty-hooked and guarded generation of the same tokens, interleaved."""
    batch = _batch(decoder, batch_rows, seed=5)
    options: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
    }
    tap = ActivationTap(decoder.model, decoder.bundle.probe.sites)

    def hooked(**given: object) -> None:
        with tap.installed():
            decoder.model.generate(**given)

    arms = {
        "bare": Arm("bare", decoder.model.generate),
        "hooks": Arm("hooks", hooked),
        # flag: the guard's whole path, with no row leaving it however long the answers grow
        "guard": Arm("guard", partial(decoder.generate, redirect="flag")),
    }
    laps = interleaved(arms, options, rounds=rounds)
    return [
        _row(f"time a token, batch {batch_rows}", laps, _a_token, "<= 1.05"),
        _row(f"a whole call of {NEW_TOKENS} tokens, batch {batch_rows}", laps, _whole, "none"),
    ]


def _a_token(lap: Lap) -> float:
    """Milliseconds between one token and the next, mean of a call."""
    return sum(lap.steps) / len(lap.steps) / 1e6


def _whole(lap: Lap) -> float:
    """Milliseconds a token of the call from end to end: encoding, closing forward, traces."""
    return (lap.first + sum(lap.steps) + lap.rest) / NEW_TOKENS / 1e6


def _row(
    what: str, laps: Mapping[str, Sequence[Lap]], read: Callable[[Lap], float], target: str
) -> dict[str, Any]:
    taken = {name: [read(lap) for lap in mine] for name, mine in laps.items()}
    against = {
        name: interval_of([a / b for a, b in zip(taken[name], taken["bare"], strict=True)])
        for name in ("hooks", "guard")
    }
    ratio = against["guard"]
    return {
        "what": what,
        "n": len(taken["bare"]),
        "bare ms a token": round(median(taken["bare"]), 3),
        "empty hooks / bare": round(against["hooks"].point, 4),
        "guarded / bare, median": round(ratio.point, 4),
        "95 % interval": ratio.as_list(4),
        "target": target,
        "met": "–" if target == "none" else "yes" if ratio.point <= 1.05 else "no",
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
        "bare ms a token": None,
        "empty hooks / bare": None,
        "guarded / bare, median": None,
        "95 % interval": f"{100 * same / untripped:.2f} % identical",
        "target": "100 %",
        "met": "yes" if same == untripped and tripped else "no",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write `results/cost.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--batches", type=int, default=20)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = load_model(artefact("aligned"))
    decoder = SafeDecoder(loaded.model, loaded.tokenizer, ProbeBundle.load(artefact("bundle")))
    rows = []
    for batch_rows in (1, 32):
        rows += time_rows(decoder, batch_rows, arguments.rounds)
    rows.append(identical_rows(decoder, arguments.batches))
    for row in rows:
        LOG.info("%s", json.dumps(row))
    write_results("cost", rows, card(threads=torch.get_num_threads(), new_tokens=NEW_TOKENS))


if __name__ == "__main__":
    main()
