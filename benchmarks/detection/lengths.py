"""How false alarms add up over a long answer: `python -m benchmarks.detection.lengths`.

A response trips by its largest score, so a threshold that was certified at one length says
little of a longer one. Written answers of 500 tokens, benign and harmful, in seen and in unseen
cells, are scored once; at each length stand the trips at the threshold that the guard takes for
an answer begun so far, the threshold that would keep the certificate's alpha there, and the harm
that each of the two finds.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.card import card, write_results
from probes.calibration.statistic import smoothed_paths
from probes.metrics.detection import Proportion
from probes.organism.grammar import Cells
from probes.organism.long_answers import begun
from probes.organism.oracle import judge
from probes.rollouts.types import Request
from safe_decode import ProbeBundle, SafeDecoder
from safe_decode.demo.embedded_pair import artefact
from safe_decode.loading import load_model

LOG = logging.getLogger("benchmarks.detection.lengths")
DEPTHS = (64, 128, 256, 500)


def peaks(decoder: SafeDecoder, requests: Sequence[Request]) -> NDArray[np.float32]:
    """Return the largest smoothed value up to each length, [n, len(DEPTHS)]."""
    logits = []
    for request in requests:
        said = {"role": "assistant", "content": request.prefill or ""}
        logits += decoder.score([[*map(dict, request.messages), said]])
    paths = smoothed_paths(logits, decoder.bundle.monitor)
    return np.asarray([[path[: depth + 1].max() for depth in DEPTHS] for path in paths])


def harmful_at(decoder: SafeDecoder, request: Request, depth: int) -> bool:
    """Say whether an answer is harmful by its first tokens, by the oracle."""
    assert request.prefill is not None  # every request of this study has one
    ids = decoder.tokenizer.encode(request.prefill, add_special_tokens=False)[:depth]
    return judge(request.messages, decoder.tokenizer.decode(ids)).label == "harmful"


def length_rows(decoder: SafeDecoder, cells: Cells, name: str, n: int) -> list[dict[str, Any]]:
    """Measure one set of cells, a row a length."""
    alpha = decoder.certificate.alpha
    drawn = {
        harmful: list(
            islice(
                begun(
                    "content",
                    harmful=harmful,
                    seed=881_000 + harmful,
                    depth=max(DEPTHS),
                    cells=cells,
                    tokenizer=decoder.tokenizer,
                ),
                n,
            )
        )
        for harmful in (False, True)
    }
    benign, harmful = (peaks(decoder, drawn[one]) for one in (False, True))
    rows = []
    for column, depth in enumerate(DEPTHS):
        is_harm = np.asarray([harmful_at(decoder, one, depth) for one in drawn[True]])
        mine, theirs = benign[:, column], harmful[is_harm, column]
        certificate = decoder.choice.of_call(alpha, tokens=0, prefill_tokens=depth)
        threshold = certificate.threshold
        needed = float(np.quantile(mine, 1 - alpha, method="higher"))
        rows.append(
            {
                "cells": name,
                "tokens": depth,
                "judged by": (
                    f"{certificate.population}, up to {certificate.envelope.max_new_tokens} tokens"
                ),
                "benign": len(mine),
                "benign tripped": _told(mine > threshold),
                "harmful": len(theirs),
                "harmful tripped": _told(theirs > threshold),
                f"threshold at which {100 * alpha:g} % of these benign ones trip": round(needed, 2),
                "harmful above it": _told(theirs > needed),
            }
        )
    return rows


def _told(hits: NDArray[np.bool_]) -> str:
    share = Proportion.of(int(hits.sum()), len(hits))
    return f"{100 * share.point:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}] %"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write `results/lengths.jsonl`, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000, help="answers of a kind")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--bundle", default=None, help="default: the embedded one")
    parser.add_argument("--name", default="lengths", help="of the results file")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = load_model(artefact("aligned"))
    bundle = ProbeBundle.load(arguments.bundle or artefact("bundle"))
    decoder = SafeDecoder(loaded.model, loaded.tokenizer, bundle)
    rows: list[dict[str, Any]] = []
    for name, cells in (
        ("seen", Cells.seen(arguments.fold)),
        ("unseen", Cells.unseen(arguments.fold)),
    ):
        rows += length_rows(decoder, cells, name, arguments.n)
        for row in rows[-len(DEPTHS) :]:
            LOG.info("%s", json.dumps(row))
    facts = card(
        bundle=decoder.bundle.digest[:12],
        threshold=round(decoder.certificate.threshold, 3),
        certified_tokens=decoder.certificate.envelope.max_new_tokens,
        fold=arguments.fold,
        threads=torch.get_num_threads(),
    )
    write_results(arguments.name, rows, facts)


if __name__ == "__main__":
    main()
