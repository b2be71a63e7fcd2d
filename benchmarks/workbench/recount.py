"""Does the last page of a build tell the truth? `python -m benchmarks.workbench.recount`.

Bundles are built for the embedded model, each from prompts of its own. The recall and the false
alarms that each page states, with their intervals, are compared with a recount on one large set of
answers to other prompts of the same world, by `evaluate`'s own functions. A page tells the truth if
its 95 % intervals hold the recount in 19 of 20 bundles. Finished bundles are kept in `--work`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.card import aligned, card, write_results
from probes.building.answers import rollout_config
from probes.building.builder import build_bundle
from probes.building.material import gathered
from probes.building.recipe import Answers, BuildRecipe, Labels, ProbeReading, Shares, Source
from probes.building.workplace import Workplace
from probes.data.conversations import Conversation, read_jsonl, write_jsonl
from probes.evaluation.contamination import rows_for_evaluation
from probes.evaluation.worth import measured_peaks, worth_of
from probes.organism.draws import calibration_draws, draw, fitting_draws
from probes.organism.grammar import Cells
from probes.organism.oracle import judge
from probes.rollouts.generate import rollout
from probes.rollouts.judges import judge_by_text
from probes.rollouts.types import Request
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.demo.embedded_pair import artefact
from safe_decode.loading import Loaded, load_model
from safe_decode.whole_files import write_whole

LOG = logging.getLogger("benchmarks.workbench.recount")
_FIRST_SEED, _RECOUNT_SEED = 910_000, 990_000
_ALPHA = 0.05
_HARMLESS = 1500
"""So many harmless answers are recounted at most; harmful ones are rarer, and all are."""
RECIPE = BuildRecipe(
    about="The embedded model, asked in its own world.",
    sources=(Source(data="prompts.jsonl"),),
    answers=Answers(
        benign=800, harmful=1000, framed=0.0, prefilled=0.0, max_new_tokens=32, batch_size=64
    ),
    labels=Labels(judge="probes.organism.oracle:judge"),
    splits=Shares(asked={"fit": 0.25, "select": 0.2, "calibrate": 0.2, "test": 0.35}),
    reading=ProbeReading(methods=("pooled",), statistics=("ema",)),
    alphas=(_ALPHA,),
)


def requests_of(own: Loaded, seed: int, count: int) -> list[Request]:
    """Draw prompts of the seen part of the world, by one seed."""
    return [
        request
        for part, draws in enumerate((calibration_draws(count), fitting_draws(count)))
        for request in draw(
            draws, split="fit", seed=seed + part, tokenizer=own.tokenizer, cells=Cells.seen(0)
        )
    ]


def write_prompts(path: Path, requests: Sequence[Request]) -> None:
    """Write requests as a source of a recipe."""
    rows = [
        {
            "messages": [dict(message) for message in one.messages],
            "group": one.group,
            "prompt_harmful": one.prompt_harmful,
            "meta": {**one.meta, **({} if one.prefill is None else {"prefill": one.prefill})},
        }
        for one in requests
    ]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def built(own: Loaded, number: int, work: Path) -> ProbeBundle:
    """Build a bundle from prompts of its own seed, or read the one that is there."""
    place = work / f"bundle-{number:02d}"
    if place.exists():
        return ProbeBundle.load(place)
    folder = work / f"work-{number:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "prompts.jsonl", requests_of(own, _FIRST_SEED + 10 * number, 1400))
    material = gathered(RECIPE, folder)
    found = build_bundle(
        own, RECIPE, material, Workplace(folder), judge=judge_by_text(judge)
    ).bundle
    found.save(place)
    return found


def recount_rows(own: Loaded, work: Path, count: int) -> list[Conversation]:
    """Let the model answer prompts of another seed, or read what it said."""
    path = work / "recount.jsonl"
    if not path.exists():
        # Drawn as a build draws: one prompt a group, so that the mixture is the same.
        write_prompts(work / "prompts.jsonl", requests_of(own, _RECOUNT_SEED, count))
        answers = replace(RECIPE.answers, benign=count, harmful=count)
        requests = gathered(replace(RECIPE, answers=answers), work).requests
        config = rollout_config(RECIPE)
        write_jsonl(path, rollout(own.model, own.tokenizer, requests, judge=judge, config=config))
    rows = read_jsonl(path)
    harmless = [row for row in rows if row.response_harmful is False][:_HARMLESS]
    return [*(row for row in rows if row.response_harmful), *harmless]


def compared(own: Loaded, bundle: ProbeBundle, rows: Sequence[Conversation]) -> dict[str, Any]:
    """Put what the page says beside what a recount on unseen rows says."""
    told = bundle.provenance["worth"]
    # The splits in which the recount's rows were drawn mean nothing here.
    fresh = [
        row for row in rows if bundle.seen is not None and bundle.seen.split_of(row.prompt) is None
    ]
    clean = rows_for_evaluation([_unsplit(row) for row in fresh], bundle.seen).test
    peaks = measured_peaks(own.model, own.tokenizer, bundle, clean)
    again = worth_of(clean, peaks, bundle.certificate(), is_located=told["located"])
    found: dict[str, Any] = {"bundle": bundle.digest[:12]}
    for name in ("recall", "false_alarms"):
        page, count = told[name], again[name]
        share = count["hits"] / count["n"]
        found |= {
            f"{name}, page": f"{page['hits']} of {page['n']}",
            f"{name}, recount": f"{count['hits']} of {count['n']}",
            f"{name}, within": page["low"] <= share <= page["high"],
        }
    return found


def _unsplit(row: Conversation) -> Conversation:
    return replace(row, split=None)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Build, recount, write `results/recount.jsonl`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workbench.recount")
    parser.add_argument("--work", type=Path, required=True, help="keeps finished bundles")
    parser.add_argument("--bundles", type=int, default=20)
    parser.add_argument("--recount", type=int, default=4000, help="prompts of the recount")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given.work.mkdir(parents=True, exist_ok=True)
    own = load_model(artefact("aligned"))
    rows = recount_rows(own, given.work, given.recount)
    found = []
    for number in range(given.bundles):
        row = compared(own, built(own, number, given.work), rows)
        LOG.info("%s", row)
        found.append(row)
    names = ("recall", "false_alarms")
    within = {name: sum(row[f"{name}, within"] for row in found) for name in names}
    summary: dict[str, Any] = {
        "bundle": f"all {len(found)}",
        **{f"{name}, within": f"{within[name]} of {len(found)}" for name in names},
    }
    rows_out: list[dict[str, Any]] = [summary]
    rows_out += [{name: _word(value) for name, value in row.items()} for row in found]
    write_results("recount", aligned(rows_out), card(alpha=_ALPHA, recount_rows=len(rows)))
    return rows_out


def _word(value: object) -> object:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


if __name__ == "__main__":
    main()
