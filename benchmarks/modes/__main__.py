"""Measure every mode: `python -m benchmarks.modes`.

The parts: *laws* (untripped rows beside tripping ones in every mode and family, and the same
rows in random batches), *isolation* (threads, sessions, strangers; many calls, some cancelled,
some failed), *readers* (time to the first released token, rewind beside a canned refusal),
*tries* (harm released against tries) and *looks* (the self-check). Each writes
`results/modes-PART.jsonl`. Only *readers* and the cost in *looks* need a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import card, write_results
from benchmarks.modes import isolation, laws, readers, rewind_tries, self_check
from benchmarks.modes.subjects import EVERY_FAMILY, embedded, tiny
from safe_decode import SafeDecoder
from safe_decode.demo.embedded_pair import embedded as load_embedded

LOG = logging.getLogger("benchmarks.modes")
PLOT = Path(__file__).resolve().parents[2] / "docs" / "results" / "rewind-tries.png"


@dataclass(frozen=True)
class ModesSize:
    """How much is measured.

    Attributes:
        scale: Of rounds, calls and requests; 1 for what is reported.
        families: Tiny models.
        cap: New tokens of a call.
    """

    scale: float
    families: Sequence[str]
    cap: int

    def of(self, full: int, least: int = 2) -> int:
        """Return a count at this scale."""
        return max(least, round(full * self.scale))


def law_rows(size: ModesSize) -> list[dict[str, Any]]:
    """Untripped rows in every mode and family, and the row law."""
    subjects = [embedded(rows=size.of(12, 4), new_tokens=size.cap)]
    subjects += [
        tiny(family, rows=size.of(12, 4), new_tokens=min(size.cap, 24)) for family in size.families
    ]
    rows: list[dict[str, Any]] = []
    for measured in subjects:
        for mode in laws.MODES:
            rows.append(laws.untripped(measured, mode))
            LOG.info("%s", json.dumps(rows[-1]))
    return laws.by_mode(rows)


def composition_rows(size: ModesSize) -> list[dict[str, Any]]:
    """The row law on random batches."""
    subjects = [embedded(rows=8, new_tokens=size.cap)]
    subjects += [tiny(family, rows=8, new_tokens=min(size.cap, 24)) for family in size.families]
    return [laws.row_law(one, compositions=size.of(100, 3)) for one in subjects]


def isolation_rows(size: ModesSize) -> list[dict[str, Any]]:
    """Threads, sessions and what is left behind."""
    measured = embedded(rows=4, new_tokens=min(size.cap, 32))
    calls, some = size.of(1_000, 20), size.of(50, 2)
    return [
        isolation.isolated(measured, rounds=size.of(20, 2)),
        isolation.churn(measured, calls=calls, cancelled=some, failed=some),
    ]


def reader_rows(size: ModesSize) -> list[dict[str, Any]]:
    """Time to the first released token."""
    measured = embedded(rows=8, new_tokens=size.cap)
    return readers.first_token(measured, (0, 4, 16), rounds=size.of(40))


def redirect_rows(size: ModesSize) -> list[dict[str, Any]]:
    """Rewind beside a canned refusal."""
    measured = embedded(rows=8, new_tokens=size.cap)
    return readers.redirect_costs(measured, rounds=size.of(20))


def tries_rows(size: ModesSize) -> list[dict[str, Any]]:
    """Harm released against tries."""
    loaded = load_embedded()
    decoder = SafeDecoder(loaded.model, loaded.tokenizer, loaded.bundle)
    requests = rewind_tries.attacks(loaded.tokenizer, size.of(1_000, 8))
    return rewind_tries.harm_by_tries(decoder, requests, new_tokens=min(160, 2 * size.cap))


def look_rows(size: ModesSize) -> list[dict[str, Any]]:
    """The self-check."""
    return self_check.look_rows(
        responses=size.of(1_500, 120), rounds=size.of(20), new_tokens=min(160, 2 * size.cap)
    )


PARTS: dict[str, Callable[[ModesSize], list[dict[str, Any]]]] = {
    "laws": law_rows,
    "compositions": composition_rows,
    "isolation": isolation_rows,
    "readers": reader_rows,
    "redirects": redirect_rows,
    "tries": tries_rows,
    "looks": look_rows,
}


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Measure the parts, write them, and print each row as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modes", description=__doc__)
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="parts to measure")
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts; below 1: a trial")
    parser.add_argument("--tiny", action="store_true", help="one tiny family, a few of everything")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    size = ModesSize(given.scale, EVERY_FAMILY, 64)
    if given.tiny:
        size = ModesSize(0.005, ("llama",), 12)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in given.only or PARTS:
        began = time.monotonic()
        found[name] = PARTS[name](size)
        for row in found[name]:
            LOG.info("%s", json.dumps(row))
        LOG.info("%s: %.0f s", name, time.monotonic() - began)
        if not given.dry:
            facts = card(threads=torch.get_num_threads(), scale=size.scale, new_tokens=size.cap)
            write_results(f"modes-{name}", found[name], facts)
    if "tries" in found and not given.dry:
        rewind_tries.plot(found["tries"], PLOT)
    return found


if __name__ == "__main__":
    main()
