"""The whole set for the CPU: `python -m benchmarks.cost.latency`.

Ladders, growth and stages into `results/latency.jsonl`, `growth.jsonl` and `stages.jsonl`, the
stated targets with what was measured into `targets.jsonl`, peers into `peers.jsonl`; then
`docs/results/cost.md` is filled and its plot drawn. The machine should have nothing else to do;
its load stands on the card.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import card, write_results
from benchmarks.cost.stages import stage_rows
from benchmarks.docs import readme
from benchmarks.peers.__main__ import measure as measure_peers
from safe_decode.bench.arms import Clock, Load
from safe_decode.bench.models import embedded_subject, of_shape
from safe_decode.bench.plots import plot
from safe_decode.bench.runner import ladder_rows
from safe_decode.bench.scaling import Axis, Made, growth_rows

LOG = logging.getLogger("benchmarks.cost.latency")
LADDER, PAIR = "ladder", "pair"
PLOT = Path(__file__).resolve().parents[2] / "docs" / "results" / "cost.png"

GROWTH: tuple[tuple[Axis, tuple[int, ...]], ...] = (
    ("batch", (1, 4, 16, 64)),
    ("context", (128, 1_024, 8_192)),
    ("features", (64, 256, 1_024, 2_560)),
    ("heads", (1, 4, 16)),
    ("sites", (1, 2, 5)),
    ("vocab", (2_000, 16_000, 128_000)),
)


def ladders(clock: Clock, scale: float) -> list[dict[str, Any]]:
    """Measure the whole ladder on the embedded model, then pairs of bare and guarded calls.

    The ladder runs with as many threads as torch takes. The pairs are what is set against the
    targets: two arms leave time for many more rounds, which is what a few parts in a thousand
    take. They run once with all threads and once with one: two threads on two cores wait for each
    other whenever somebody else wants a core.
    """
    threads = torch.get_num_threads()
    embedded = embedded_subject()
    rows = ladder_rows(embedded, Load(1, 128, 64, clock), rounds=_n(60, scale))
    rows += ladder_rows(embedded, Load(32, 128, 32, clock), rounds=_n(30, scale))
    rows = [_told(LADDER, row) for row in rows]
    for count in sorted({threads, 1}, reverse=True):
        torch.set_num_threads(count)
        try:
            rows += [_told(PAIR, row) for row in pairs(clock, scale)]
        finally:
            torch.set_num_threads(threads)
    return rows


def pairs(clock: Clock, scale: float) -> list[dict[str, Any]]:
    """Measure guarded beside bare, with the threads that are set; the 160M shape at full scale."""
    embedded, only = embedded_subject(), ("guard",)
    rows = ladder_rows(embedded, Load(1, 128, 64, clock), rounds=_n(320, scale), only=only)
    rows += ladder_rows(embedded, Load(32, 128, 32, clock), rounds=_n(120, scale), only=only)
    if scale >= 1:
        larger = of_shape("llama-160m")
        rows += ladder_rows(larger, Load(1, 64, 16, clock), rounds=_n(60, scale), only=only)
        rows += ladder_rows(larger, Load(8, 64, 12, clock), rounds=_n(30, scale), only=only)
    return rows


def _told(run: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"run": run, "threads": torch.get_num_threads(), **row}


def growth(clock: Clock, scale: float) -> list[dict[str, Any]]:
    """Vary one thing at a time on the embedded model's shape."""
    made, load = Made("embedded"), Load(1, 64, 24, clock)
    rows: list[dict[str, Any]] = []
    for axis, values in GROWTH:
        kept = values if scale >= 1 else values[:2]
        rows += growth_rows(made, axis, kept, load, rounds=_n(8, scale))
    return rows


def target_rows(
    ladder: Sequence[dict[str, Any]],
    growths: Sequence[dict[str, Any]],
    peers: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Put the stated targets beside what was measured; a target is met by the point."""
    guards = [r for r in ladder if r["arm"] == "guard" and r["run"] == PAIR]
    rows = []
    for row in guards:
        name, batch = str(row["subject"]), int(row["batch"])
        of = f"{name}, batch {batch}, {row['threads']} threads"
        if bound := _RATIOS.get((name, batch)):
            rows.append(_target(f"{of}: ratio", row["ratio"], row["ratio_95"], bound))
        if (name, batch) == ("embedded", 1):
            rows.append(_target(f"{of}: added us", row["added_us"], row["added_us_95"], 60))
        if (name, batch) == ("embedded", 32):
            rows.append(_target(f"{of}: added KiB", row["added_kib"], None, 1024))
    context = next((r for r in growths if r["axis"] == "context"), None)
    if context is not None:
        low, high = context["slope_us_95"]
        flat = {"measured": context["slope_us_per_unit"], "95 % interval": [low, high]}
        rows.append(
            {"what": "slope with context, us a token of it", "target": "0 inside the interval"}
            | flat
            | {"met": "yes" if low <= 0 <= high else "no"}
        )
    for what, least in _PEERS.items():
        found = next((r for r in peers if r["what"] == what and r["batch"] == 1), None)
        if found is not None and found["times ours"] is not None:
            rows.append(
                {
                    "what": f"{what}: times our cost",
                    "target": f">= {least}",
                    "measured": found["times ours"],
                    "95 % interval": None,
                    "met": "yes" if found["times ours"] >= least else "no",
                }
            )
    return rows


_RATIOS = {
    ("embedded", 1): 1.02,
    ("embedded", 32): 1.015,
    ("llama-160m", 1): 1.005,
    ("llama-160m", 8): 1.005,
}
_PEERS = {"guard model, a tenth, own cache": 10, "hidden states, scikit-learn": 5}


def _target(what: str, value: float, interval: object, bound: float) -> dict[str, Any]:
    return {
        "what": what,
        "target": f"<= {bound:g}",
        "measured": value,
        "95 % interval": interval,
        "met": "yes" if value <= bound else "no",
    }


def _n(rounds: int, scale: float) -> int:
    return max(2, round(rounds * scale))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the rounds; below 1: a trial")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    began = time.monotonic()
    clock: Clock = given.clock
    results: dict[str, list[dict[str, Any]]] = {"latency": ladders(clock, given.scale)}
    LOG.info("ladders: %.0f s", time.monotonic() - began)
    results["growth"] = growth(clock, given.scale)
    LOG.info("growth: %.0f s", time.monotonic() - began)
    embedded = embedded_subject()
    results["stages"] = [
        row
        for batch in (1, 32)
        for row in stage_rows(embedded, Load(batch, 128, 32), calls=_n(10, given.scale))
    ]
    peer_load = Load(1, 64, 256 if given.scale >= 1 else 26, clock)
    results["peers"] = measure_peers(embedded, peer_load, _n(40, given.scale))
    results["targets"] = target_rows(results["latency"], results["growth"], results["peers"])
    LOG.info("all: %.0f s", time.monotonic() - began)
    if given.dry:
        return
    facts = card(threads=torch.get_num_threads(), clock=clock, scale=given.scale)
    for name, rows in results.items():
        write_results(name, rows, facts)
    ladder = [row for row in results["latency"] if row["run"] == LADDER]
    plot(ladder + results["growth"], PLOT)
    readme.main(("latency", "targets", "stages", "growth", "peers"))


if __name__ == "__main__":
    main()
