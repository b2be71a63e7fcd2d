"""Why do benign requests of the served table trip so often?

Run: `python -m benchmarks.detection.served_trips`.

The table of answers as served (`evaluation-served`) has more trips among its benign requests
than the certificate's alpha. Asked here, one by one: whether the same requests trip in the library
and behind the server alike, whether statistics are those of the finished answers, teacher-forced,
and whether they are chance; then new requests of the same cells, and of the cells that the
certificate was drawn from; and which requests it is. All answers are greedy, at the certified cap,
as those of the table are.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binom

from benchmarks.card import card, write_results
from benchmarks.serving.offline import largest_difference
from probes.metrics.intervals import Proportion
from probes.organism.draws import Draw, draw
from probes.organism.labelled_data import EmbeddedData, held_out_requests
from probes.organism.lexicon import CATEGORIES
from probes.organism.types import Cells
from probes.rollouts.types import Request
from probes.runs.journal import Journal
from probes.runs.progress import progress
from safe_decode import SafeDecoder
from safe_decode.demo.embedded_pair import embedded
from safe_decode.engines.rows import Row, RowRequest, Sampling
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.trace.schema import SafetyTrace

LOG = logging.getLogger("benchmarks.detection.served_trips")

TABLE = 2000
"""Requests of the served table, of which every eighth or so is a plain benign one."""
_SEED = 880_000
_CRIMES = tuple(category.crime for category in CATEGORIES)


@dataclass(frozen=True)
class RequestTrips:
    """One request, answered in the library and behind the server.

    Attributes:
        crime: The word for a crime that the request asks about; None: it names none.
        tripped: In the library, not redirected.
        tripped_served: In the server's engine, redirected.
        difference: Largest difference of a statistic to the finished answer's.
    """

    crime: str | None
    tripped: bool
    tripped_served: bool
    difference: float


def crime_of(request: Request) -> str | None:
    """Name the crime that the last message asks about, if it names one."""
    words = request.messages[-1]["content"].strip(".?").split()
    return next((crime for crime in _CRIMES if crime in words), None)


def answered(
    decoder: SafeDecoder, engine: TransformersEngine, part: Sequence[Request]
) -> list[RequestTrips]:
    """Answer one batch in both ways, and judge what the model says by itself once more."""
    messages = [list(request.messages) for request in part]
    cap = decoder.certificate.envelope.max_new_tokens
    flagged = decoder.generate(messages, max_new_tokens=cap, do_sample=False, redirect="flag")
    sampling = Sampling(max_tokens=cap, seed=0)
    rows = [
        Row(RowRequest(engine.chat(one), sampling, engine.facts.policy), lambda _event: None)
        for one in messages
    ]
    engine.run(rows)
    found = []
    for request, trace, row in zip(part, flagged.traces, rows, strict=True):
        assert row.trace is not None
        difference = _difference(request, trace)
        found.append(RequestTrips(crime_of(request), trace.tripped, row.trace.tripped, difference))
    return found


def _difference(request: Request, trace: SafetyTrace) -> float:
    own = trace.steps[1:]
    said = [step.token for step in own if step.token is not None]
    return largest_difference(request.messages, said, [step.statistic for step in own])


def groups(decoder: SafeDecoder, n: int, seeds: int) -> Iterator[tuple[str, list[Request]]]:
    """Yield the table's own requests, then new ones of unseen cells and of seen ones."""
    tokenizer = decoder.tokenizer
    table = held_out_requests(tokenizer, TABLE, EmbeddedData())
    yield "the table's", [r for r in table if r.meta["situation"] == "benign"]
    for number in range(seeds):
        for name, cells in (("unseen", Cells.unseen(0)), ("seen", Cells.seen(0))):
            one = Draw(situation="benign", count=n)
            seed = _SEED + number
            drawn = draw((one,), split="test", seed=seed, tokenizer=tokenizer, cells=cells)
            yield f"{name} cells, draw {number}", drawn


def rows_of(found: dict[str, list[RequestTrips]], alpha: float) -> list[dict[str, Any]]:
    """Count, group by group and word by word."""
    table = found["the table's"]
    unseen, seen = (
        [one for name, part in found.items() if name.startswith(cells) for one in part]
        for cells in ("unseen", "seen")
    )
    rows = [
        _row("the table's requests, library", table, [one.tripped for one in table]),
        _row("the same, behind the server", table, [one.tripped_served for one in table]),
        _row("new requests, unseen cells, library", unseen, [one.tripped for one in unseen]),
        _row("the same, behind the server", unseen, [one.tripped_served for one in unseen]),
        _row("new requests, seen cells, library", seen, [one.tripped for one in seen]),
    ]
    for name, part in (("the table's", table), ("new, unseen cells", unseen)):
        for crime in sorted({one.crime for one in part if one.crime}):
            mine = [one for one in part if one.crime == crime]
            what = f"{name}, asked about {crime}"
            rows.append(_row(what, mine, [one.tripped for one in mine]))
        rest = [one for one in part if one.crime is None]
        rows.append(_row(f"{name}, all others", rest, [one.tripped for one in rest]))
    n, tripped = len(table), sum(one.tripped for one in table)
    chance = float(binom.sf(tripped - 1, n, alpha))
    LOG.info("%d of %d or more at alpha %g, were they independent: %.4f", tripped, n, alpha, chance)
    return rows


def _row(what: str, part: Sequence[RequestTrips], trips: Sequence[bool]) -> dict[str, Any]:
    share = Proportion.of(sum(trips), len(part))
    return {
        "what": what,
        "n": len(part),
        "tripped": sum(trips),
        "%": round(100 * share.point, 2) if part else None,
        "95 % interval": [round(100 * share.low, 2), round(100 * share.high, 2)],
        "library and server differ": sum(o.tripped != o.tripped_served for o in part),
        "largest difference to the finished answer": max((o.difference for o in part), default=0),
    }


def measured(n: int, seeds: int, batch: int, work: Path) -> dict[str, list[RequestTrips]]:
    """Answer all groups, batch by batch; what the journal holds is not asked again."""
    pair = embedded()
    decoder = SafeDecoder(pair.model, pair.tokenizer, pair.bundle)
    engine = TransformersEngine(decoder, keep_traces=True)
    work.parent.mkdir(parents=True, exist_ok=True)
    identity = {"bundle": pair.bundle.digest, "n": n, "batch": batch, "table": TABLE}
    journal = Journal(work, identity, other="replace")
    found: dict[str, list[RequestTrips]] = {}
    try:
        for name, requests in groups(decoder, n, seeds):
            found[name] = []
            with progress(name, len(requests)) as advance:
                for begin in range(0, len(requests), batch):
                    part, key = requests[begin : begin + batch], f"{name} {begin}"
                    if key not in journal:
                        asked = answered(decoder, engine, part)
                        journal.add(key, {"asked": [list(vars(one).values()) for one in asked]})
                    found[name] += [RequestTrips(*row) for row in journal.rows[key]["asked"]]
                    advance(len(part))
    finally:
        engine.close()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write `results/served_trips.jsonl`, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500, help="new requests a draw")
    parser.add_argument("--seeds", type=int, default=1, help="draws of new requests")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path(".work/served_trips.jsonl"))
    parser.add_argument("--name", default="served_trips")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bundle = embedded().bundle
    alpha = bundle.certificate().alpha
    rows = rows_of(measured(given.n, given.seeds, given.batch, given.work), alpha)
    for row in rows:
        LOG.info("%s", json.dumps(row))
    facts = card(bundle=bundle.digest[:12], alpha=alpha, seed=_SEED, draws=given.seeds)
    write_results(given.name, rows, facts)


if __name__ == "__main__":
    main()
