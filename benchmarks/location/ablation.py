"""Study 1: what goes without the located units: `python -m benchmarks.location.ablation`.

Locates on one part of the prompts, searches ratios on a second and reports on a third: the
located set, 19 random sets matched on layer and kind and 19 on importance too (99 of each for
the first-token margin), UCU and top I_S; by the stated ratios and by the searched ones, with
both metrics; and the stability of location against chance.

On two idle cores: about 20 minutes for the embedded pair, 60 for one of 7 M parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.location.arguments import journal_of, pair_of, parser_of
from benchmarks.location.located import LocatedOn, located_on, search_data
from benchmarks.location.pair import Pair
from probes.analysis.ablation import (
    AblationConfig,
    AblationData,
    AblationResult,
    ablate,
    arms_of,
    rise,
)
from probes.analysis.behaviour import Outcomes
from probes.analysis.ratio_search import SearchConfig, search_ratios
from probes.location.importance import Variant
from probes.location.locate import LocateConfig
from probes.location.stability import stability
from probes.location.units import Ratios, UnitSet, assign
from probes.rollouts.generate import RolloutConfig
from probes.runs.journal import Journal
from safe_decode.loading import Loaded

LOG = logging.getLogger("benchmarks.location.ablation")
_VARIANTS: tuple[Variant, ...] = ("flap", "plain")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, keep every arm as it is measured."""
    parser = parser_of(__doc__)
    parser.add_argument("--located-on", type=int, default=400, help="prompts of each kind")
    parser.add_argument("--reported-on", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--random-sets", type=int, default=19)
    parser.add_argument("--margin-sets", type=int, default=99)
    parser.add_argument("--variants", nargs="+", choices=_VARIANTS, default=list(_VARIANTS))
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.located_on, arguments.reported_on = 60, 12
        arguments.random_sets, arguments.margin_sets = 2, 3
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pair = pair_of(arguments)
    journal = journal_of(
        "ablation",
        pair,
        arguments,
        located_on=arguments.located_on,
        reported_on=arguments.reported_on,
        random_sets=arguments.random_sets,
        margin_sets=arguments.margin_sets,
    )
    loaded = pair.load("aligned")
    config = AblationConfig(
        random_sets=arguments.random_sets,
        margin_sets=arguments.margin_sets,
        seed=arguments.seed,
        generation=RolloutConfig(max_new_tokens=96),
    )
    data: AblationData | None = None
    variants: list[Variant] = arguments.variants
    for variant in variants:
        chosen = LocateConfig(variant=variant)
        found = located_on(pair, loaded, prompts=arguments.located_on, config=chosen)
        data = data or _data(pair, loaded, found, arguments.reported_on)
        _located(journal, variant, found)
        if variant == variants[0]:
            _stability(journal, loaded, found, arguments.seed)
        _arms(journal, loaded, f"{variant}, stated", found.units, data, config)
        searched = _searched(journal, pair, loaded, variant, found, tiny=arguments.tiny)
        if searched is not None:
            _arms(journal, loaded, f"{variant}, searched", searched, data, config)


def _data(pair: Pair, loaded: Loaded, found: LocatedOn, n: int) -> AblationData:
    benign = pair.benign(loaded.tokenizer, n, "report")
    said = pair.answered(loaded, benign, harmful=False)
    return AblationData(
        harmful=pair.harmful(loaded.tokenizer, n, "report"),
        benign=benign,
        answers=[row for row in said if row.meta["label"] == "benign"],
        harm_judge=pair.harm_judge,
        benign_judge=pair.benign_judge,
        refusal_tokens=found.refusal_tokens,
    )


def _located(journal: Journal, variant: str, found: LocatedOn) -> None:
    key = f"located, {variant}"
    if key not in journal:
        record: dict[str, Any] = dict(found.units.provenance)
        journal.add(key, {"table": "located", "variant": variant, **record})


def _arms(
    journal: Journal,
    loaded: Loaded,
    how: str,
    units: UnitSet,
    data: AblationData,
    config: AblationConfig,
) -> None:
    measured = []
    for arm in arms_of(units, config):
        key = f"{how}: {arm.name}"
        if key not in journal:
            row = ablate(loaded.model, loaded.tokenizer, arm, data, config)
            journal.add(key, {"table": "arms", "how": how, **row.to_json()})
            LOG.info("%s: margin %.2f %s", key, row.margin, row.harmful and _told(row.harmful))
        measured.append(AblationResult.from_json(journal.rows[key]))
    for found in rise(measured):
        journal.add(f"{how}, {found.family}", {"table": "rise", "how": how, **asdict(found)})


def _told(outcomes: Outcomes) -> str:
    return ", ".join(f"{name} {count}" for name, count in outcomes.counts.items() if count)


def _searched(
    journal: Journal, pair: Pair, loaded: Loaded, variant: str, found: LocatedOn, *, tiny: bool
) -> UnitSet | None:
    """Search ratios once; None where no share of safety-critical units passed."""
    key = f"search, {variant}"
    if key not in journal:
        data = search_data(pair, loaded, found, prompts=24 if tiny else 100)
        config = SearchConfig(random_sets=2) if tiny else SearchConfig()
        result = search_ratios(loaded.model, loaded.tokenizer, found.units, data, config)
        journal.add(key, {"table": "search", "variant": variant, **result.to_json()})
    ratios = Ratios(**journal.rows[key]["ratios"])
    LOG.info("%s: %s", key, ratios)
    units = assign(found.units, ratios, provenance=found.units.provenance)
    return units if len(units.only("SCU")) else None


def _stability(journal: Journal, loaded: Loaded, found: LocatedOn, seed: int) -> None:
    if "stability" in journal:
        return
    rows = [
        asdict(row)
        for row in stability(
            loaded.model, loaded.tokenizer, found.refusals, found.answers, seed=seed
        )
    ]
    journal.add("stability", {"table": "stability", "rows": rows})


if __name__ == "__main__":
    main()
