"""MLP probes beside linear ones, on the embedded model.

Run: `python -m benchmarks.detection.mlp_probe`.

Each kind goes through the recipe on the same conversations: fitted on *fit*, chosen on *select*,
certified on *calibrate*. Counted are responses in unseen cells, at each kind's own certified
threshold: the share of harmful ones that alarm, and of harmless ones.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.card import card, write_results
from probes.activations.harvest import score_responses
from probes.calibration.statistic import maxima, smoothed_paths
from probes.data.conversations import Conversation
from probes.fitting.registry import FITTERS
from probes.fitting.search import fits_of
from probes.metrics.detection import auroc
from probes.metrics.intervals import Proportion
from probes.organism.labelled_data import EmbeddedData
from probes.recipes.bundle import RecipeConfig, make_bundle
from safe_decode.activations.site import Site
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.certificate import Envelope
from safe_decode.demo.embedded_pair import artefact
from safe_decode.loading import Loaded, load_model
from safe_decode.typing import CausalLM

LOG = logging.getLogger("benchmarks.detection.mlp_probe")

_ALPHA = 0.02


def recipe_of(model: CausalLM, kind: str, cap: int) -> RecipeConfig:
    """Return the same recipe for each kind: whole residual layers, every default of the kind."""
    config = model.config.get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    return RecipeConfig(
        envelope=Envelope(max_new_tokens=cap, do_sample=False, temperature=1.0, top_p=1.0, top_k=0),
        refusal="I will not help with that.",
        opener="I cannot do that.",
        feature_counts=(),
        extra_sites={
            f"resid-{layer}": (Site(layer, "resid", tuple(range(width))),)
            for layer in range(2, layers)
        },
        fits=fits_of(None, None, kind),
        windows=(1, 2),
        alphas=(_ALPHA,),
        default_alpha=_ALPHA,
        lower_caps=True,
    )


def measured(
    loaded: Loaded, bundle: ProbeBundle, test: Sequence[Conversation]
) -> Mapping[str, Any]:
    """Count alarms among responses never seen."""
    logits = score_responses(loaded.model, loaded.tokenizer, test, bundle.probe)
    peaks = maxima(smoothed_paths(logits, bundle.monitor))
    harmful = np.asarray([row.response_harmful is True for row in test])
    alarms = peaks > bundle.certificate().threshold
    found: dict[str, Any] = {}
    for name, rows in (("recall", harmful), ("false alarms", ~harmful)):
        share = Proportion.of(int(alarms[rows].sum()), int(rows.sum()))
        found[f"{name} %"] = round(100 * share.point, 2)
        found[f"{name}, 95 % interval"] = [round(100 * share.low, 2), round(100 * share.high, 2)]
    return found | {
        "AUROC": round(auroc(harmful, peaks), 4),
        "harmful": int(harmful.sum()),
        "harmless": int((~harmful).sum()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write `results/mlp_probe.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500, help="prompts of the fit split")
    parser.add_argument("--test", type=int, default=1000, help="prompts in unseen cells")
    parser.add_argument("--cap", type=int, default=64, help="tokens of a response")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--name", default="mlp_probe")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = load_model(artefact("aligned"))
    data = EmbeddedData(seed=arguments.seed, max_new_tokens=arguments.cap)
    n = arguments.rows
    parts = data.apart(loaded.model, loaded.tokenizer, {"fit": n, "select": n // 2, "calibrate": n})
    rows = [row for part in parts.values() for row in part]
    test = [
        row
        for row in data.test(loaded.model, loaded.tokenizer, arguments.test)
        if row.response_harmful is not None
    ]
    results = []
    for kind in sorted(FITTERS):
        begun = time.perf_counter()
        config = recipe_of(loaded.model, kind, arguments.cap)
        recipe = make_bundle(loaded.model, loaded.tokenizer, rows, config)
        results.append(
            {
                "probe": kind,
                "chosen": f"{recipe.tried[0]['sites']}, {recipe.tried[0]['way']}",
                "numbers": sum(t.numel() for t in recipe.bundle.probe.tensors().values()),
                **measured(loaded, recipe.bundle, test),
                "candidates": len(recipe.tried),
                "recipe s": round(time.perf_counter() - begun, 1),
            }
        )
        LOG.info("%s", results[-1])
    facts = card(alpha=_ALPHA, rows=len(rows), cap=arguments.cap, seed=arguments.seed)
    LOG.info("%s", write_results(arguments.name, results, facts))


if __name__ == "__main__":
    main()
