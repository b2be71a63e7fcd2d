"""From stored activations to certificates: `python -m benchmarks.workbench.fit_time`.

The embedded model answers what its own bundle was made from (kept in `--work` and reused);
activations of fit, select and calibrate are harvested to disk. Timed is what follows: every
candidate of the shipped recipe fitted and ranked, and thresholds certified.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.card import card, write_results
from probes.activations.features import ResponseFeatures, union_of_sites
from probes.activations.harvest import harvest_to
from probes.calibration.certify import Calibration, certify_populations
from probes.calibration.reach import Responses
from probes.calibration.statistic import smoothed_paths
from probes.data.conversations import Conversation, by_split, read_jsonl, write_jsonl
from probes.fitting.search import CandidateProbe, FeatureStore, ranked_candidates
from probes.location.locate import locate
from probes.location.units import sites_of
from probes.organism.build import conversations_for, recipe_config
from probes.organism.curriculum import Amounts
from probes.organism.grammar import Cells
from probes.recipes.bundle import RecipeConfig
from safe_decode.activations.site import Site
from safe_decode.demo.embedded_pair import artefact
from safe_decode.loading import Loaded, load_model
from safe_decode.typing import CausalLM

LOG = logging.getLogger("benchmarks.workbench.fit_time")


def answered(work: Path, loaded: Loaded, amounts: Amounts, seed: int) -> list[Conversation]:
    """Read the conversations, or let the model give them."""
    path = work / "conversations.jsonl"
    if path.exists():
        return read_jsonl(path)
    work.mkdir(parents=True, exist_ok=True)
    rows = conversations_for(
        loaded.model, loaded.tokenizer, seed=seed, cells=Cells.seen(0), amounts=amounts
    )
    write_jsonl(path, rows)
    return rows


def time_fit(work: Path, amounts: Amounts, seed: int) -> dict[str, Any]:
    """Store activations, then time the fit and the calibration that read them."""
    loaded = load_model(artefact("aligned"))
    model, tokenizer = loaded.model, loaded.tokenizer
    config = recipe_config(amounts, model)
    parts = {
        split: [row for row in rows if row.response_harmful is not None]
        for split, rows in by_split(answered(work, loaded, amounts, seed)).items()
    }
    sets = _site_sets(loaded, parts["locate"], config)
    harmless = [row for row in parts["calibrate"] if row.response_harmful is False]
    read = {"fit": parts["fit"], "select": parts["select"], "calibrate": harmless}
    every_site, place = union_of_sites(sets.values()), work / "features"
    stored = {
        name: harvest_to(place / name, model, tokenizer, rows, every_site)
        for name, rows in read.items()
    }
    store = FeatureStore(place)
    begun = time.perf_counter()
    ranked = ranked_candidates(
        model, tokenizer, parts["fit"], parts["select"], sets, config.search(), store
    )
    fitted = time.perf_counter()
    calibration = _calibrated(model, harmless, stored["calibrate"], ranked[0], config)
    done = time.perf_counter()
    return {
        "what": "fit, select and calibrate on stored activations",
        "responses": sum(len(features) for features in stored.values()),
        "candidates": len(ranked),
        "certificates": len(calibration.certificates),
        "fit and select, s": round(fitted - begun, 1),
        "calibrate, s": round(done - fitted, 1),
        "together, s": round(done - begun, 1),
        "target": "< 60 s",
        "met": "yes" if done - begun < 60 else "no",
    }


def _site_sets(
    loaded: Loaded, rows: Sequence[Conversation], config: RecipeConfig
) -> dict[str, tuple[Site, ...]]:
    """Locate units, and name the sets of sites that the recipe tries."""
    refusals = [row for row in rows if row.refusal and row.prompt_harmful]
    benign = [row for row in rows if not row.refusal and not row.prompt_harmful]
    units = locate(loaded.model, loaded.tokenizer, refusals, benign, config.locate)
    named = {
        f"units-{count}": sites_of(units.most_critical(count)) for count in config.feature_counts
    }
    return {**named, **config.extra_sites}


def _calibrated(
    model: CausalLM,
    harmless: Sequence[Conversation],
    stored: ResponseFeatures,
    best: CandidateProbe,
    config: RecipeConfig,
) -> Calibration:
    probe = best.fitted.probe
    logits = [
        probe(torch.from_numpy(np.array(values, dtype=np.float32)))
        for values in stored.at(probe.sites).responses
    ]
    return certify_populations(
        harmless,
        smoothed_paths(logits, best.chosen.monitor),
        alphas=config.alphas,
        delta=config.delta,
        envelope=config.envelope,
        responses=Responses.scored(model, logits),
        caps=config.caps,
        lower_caps=config.lower_caps,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write `results/fit_time.jsonl`, print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work/fit_time"))
    parser.add_argument("--fitting", type=int, default=Amounts().fitting)
    parser.add_argument("--calibration", type=int, default=Amounts().calibration)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="fit_time")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    amounts = Amounts(fitting=arguments.fitting, calibration=arguments.calibration)
    row = time_fit(arguments.work, amounts, arguments.seed)
    LOG.info("%s", json.dumps(row))
    write_results(arguments.name, [row], card(threads=torch.get_num_threads()))


if __name__ == "__main__":
    main()
