"""Puts every family to the test and writes the table: `python -m benchmarks.families [FAMILY ...]`.

Each class that transformers takes for causal language modelling, and some that take images and text
besides, is built tiny and random, and checked against the laws (`benchmarks.families.check`). One
thread: a minute and a half for all. With names, those are checked, and nothing is written.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings

import torch
import transformers

from benchmarks.card import card, write_results
from benchmarks.families.study import FAMILIES, Finding, examined

LOG = logging.getLogger("benchmarks.families")


def main(only: list[str]) -> None:
    """Check families and write `benchmarks/results/families.jsonl`."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    rows: list[Finding] = []
    for family in FAMILIES:
        if not only or family.model_type in only:
            rows.append(examined(family))
            LOG.info(json.dumps(rows[-1].row()))
    if not only:
        rows.sort(key=lambda found: (found.order, found.family.model_type))
        LOG.info("%s", write_results("families", [row.row() for row in rows], card()))


if __name__ == "__main__":
    main(sys.argv[1:])
