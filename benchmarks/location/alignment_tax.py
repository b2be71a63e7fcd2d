"""Study 3: what does alignment cost, and can it live in redundant units?

    python -m benchmarks.location.alignment_tax

The unaligned model is trained on safety examples, for the same steps in every arm: all weights,
the 20 % of units of least I_U alone (the paper's budget), and as many units of each layer and
kind drawn by lot. Read off along the way: refusal of plain harmful requests, perplexity of
benign answers, and the share of benign requests answered well.

On two idle cores: about 3 minutes a run; 15 runs, about 45 minutes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.location.arguments import journal_of, pair_of, parser_of
from benchmarks.location.pair import Pair
from benchmarks.location.tuning import TuningRun, tune
from probes.analysis.behaviour import Outcomes, perplexity
from probes.finetuning.freeze import UnitFreeze
from probes.finetuning.presets import freeze_of
from probes.location.importance import score_units
from probes.location.locate import channel_moments
from probes.location.units import Ratios, UnitSet, assign
from probes.runs.journal import Journal
from safe_decode.activations.architecture import anatomy_of
from safe_decode.loading import Loaded

LOG = logging.getLogger("benchmarks.location.alignment_tax")

_ARMS = ("all weights", "redundant units alone", "random units alone")
_BUDGET = 0.20


def main(argv: Sequence[str] | None = None) -> None:
    """Run seed by seed, keeping each run; the summary is of the seeds that are whole."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--texts", type=int, default=3000, help="safety examples")
    parser.add_argument("--asked", type=int, default=100, help="prompts of each kind a reading")
    parser.add_argument("--autocast", action="store_true", help="train in mixed bfloat16")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.seeds, arguments.steps, arguments.every = 1, 4, 2
        arguments.texts, arguments.asked = 64, 8
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pair = pair_of(arguments)
    fixed = ("seeds", "rate", "steps", "every", "texts", "asked")
    settings = {name: getattr(arguments, name) for name in fixed}
    if arguments.autocast:
        settings["autocast"] = True
    journal = journal_of("alignment-tax", pair, arguments, **settings)
    units = redundant_units(pair, pair.load("unaligned"), 16 if arguments.tiny else 400)
    safety = pair.safety(arguments.texts)
    for seed in range(arguments.seeds):
        run = TuningRun(
            steps=arguments.steps,
            every=arguments.every,
            rate=arguments.rate,
            seed=seed,
            autocast=arguments.autocast,
        )
        for arm in _ARMS:
            _one(pair, journal, arm, units, safety, run, arguments.asked)
        journal.add("summary", {"table": "summary", "rows": _summary(journal, seed + 1)})


def redundant_units(pair: Pair, loaded: Loaded, n: int) -> UnitSet:
    """Find the fifth of the units of least I_U; the unaligned model has no refusals for I_S."""
    benign = pair.benign(loaded.tokenizer, n, "locate")
    answers = pair.answered(loaded, benign, harmful=False)
    moments = channel_moments(loaded.model, loaded.tokenizer, answers)
    scores = score_units(moments, moments, head_dim=anatomy_of(loaded.model).head_dim)
    return assign(scores, Ratios(redundant=_BUDGET, safety=0, utility=0))


def _one(
    pair: Pair,
    journal: Journal,
    arm: str,
    units: UnitSet,
    safety: Sequence[Any],
    run: TuningRun,
    asked: int,
) -> None:
    key = f"{arm}, seed {run.seed}"
    if key in journal:
        return
    loaded = pair.load("unaligned")
    freeze: UnitFreeze | None = None
    if arm != "all weights":
        lot = run.seed if arm == "random units alone" else None
        freeze = freeze_of(units, "redundant", random_seed=lot)
    total = sum(p.numel() for p in loaded.model.parameters())
    trained = total - (0 if freeze is None else freeze.n_frozen(loaded.model))
    curve = tune(loaded, safety, run, _reading(pair, loaded, asked), freeze=freeze)
    row = {"table": "runs", "arm": arm, "seed": run.seed, "trained_entries": trained}
    journal.add(key, {**row, "curve": curve})
    LOG.info("%s: %s", key, {k: v for k, v in curve[-1].items() if k != "refused"})


def _reading(pair: Pair, loaded: Loaded, asked: int) -> Callable[[], dict[str, Any]]:
    harmful = pair.harmful(loaded.tokenizer, asked, "report")
    benign = pair.benign(loaded.tokenizer, asked, "report")
    answers = pair.task(asked, "report")

    def read() -> dict[str, Any]:
        refused = [
            int(row.meta["label"] == "refusal")
            for row in pair.answered(loaded, harmful, harmful=True, max_new_tokens=64)
        ]
        kept = Outcomes.of(pair.answered(loaded, benign, harmful=False))
        told = {
            "refusal": sum(refused) / len(refused),
            "benign_accuracy": kept.share("benign").point,
            "benign_refused": kept.share("refusal").point,
            "perplexity": perplexity(loaded.model, loaded.tokenizer, answers),
        }
        if pair.is_embedded:
            from probes.organism.measure import judgement_accuracy

            told |= judgement_accuracy(loaded.model, loaded.tokenizer, n=60)
        return told

    return read


def _summary(journal: Journal, seeds: int) -> list[dict[str, Any]]:
    """Say for each arm how the last reading differs from the first: mean and sd over seeds."""
    rows = []
    for arm in _ARMS:
        runs = [journal.rows[f"{arm}, seed {seed}"] for seed in range(seeds)]
        entries = runs[0]["trained_entries"]
        row: dict[str, Any] = {"arm": arm, "trained_entries": entries, "seeds": seeds}
        for name in [name for name in runs[0]["curve"][0] if name != "step"]:
            gained = [run["curve"][-1][name] - run["curve"][0][name] for run in runs]
            spread = float(np.std(gained, ddof=1)) if seeds > 1 else None
            row[name] = {"before": runs[0]["curve"][0][name], "gained": float(np.mean(gained))}
            row[name]["sd"] = spread
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
