"""A planted kind of harm on a tiny model: letters k-t are harm, and a bundle that sees them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from probes.activations.harvest import harvest, score_responses
from probes.calibration.certify import certify_populations
from probes.calibration.reach import Responses
from probes.calibration.statistic import smoothed_paths
from probes.data.conversations import Conversation, assign_splits
from probes.fitting.linear import FitConfig, LinearProbeFitter
from probes.fitting.selection import monitor_for
from safe_decode.activations.site import Site
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.certificate import Envelope
from tests.own_rows import as_own

HARMLESS, HARMFUL = range(97, 107), range(107, 117)  # bytes of a-j, k-t
SITES = (Site(1, "resid", tuple(range(32))), Site(2, "mlp", tuple(range(32))))
SHARES = {"locate": 0.0, "fit": 0.3, "select": 0.1, "calibrate": 0.35, "test": 0.25}


def _text(rng: np.random.Generator, letters: range, n: int) -> str:
    return bytes(rng.choice(list(letters), size=n).tolist()).decode()


def is_harm(text: str) -> bool:
    """Three letters of the harmful half in a row."""
    return any(
        all(ord(letter) in HARMFUL for letter in text[i : i + 3]) for i in range(len(text) - 2)
    )


def planted_rows(n: int, seed: int = 0) -> list[Conversation]:
    """Harmful requests answered either way, and benign ones; half of each cell."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(n):
        asks, does = row % 3 != 0, row % 3 == 1
        start = _text(rng, HARMLESS, int(rng.integers(6, 14)))
        response = start + _text(rng, HARMFUL if does else HARMLESS, 14)
        rows.append(
            Conversation(
                messages=(
                    {"role": "user", "content": _text(rng, HARMFUL if asks else HARMLESS, 6)},
                ),
                response=response,
                group=f"g{row}",
                response_harmful=does,
                prompt_harmful=asks,
                refusal=asks and not does,
                category="even" if row % 2 else "odd",
                onset_char=len(start) if does else None,
                meta={"source": f"s{row % 2}", "population": "hard" if asks else "benign"},
            )
        )
    return assign_splits(rows, seed=seed, shares=SHARES)


def planted_bundle(model: Any, tokenizer: Any, parts: Any) -> ProbeBundle:
    """Fit, smooth and certify at 5 %, without locating or choosing."""
    features = harvest(model, tokenizer, parts["fit"], SITES)
    fitted = LinearProbeFitter(FitConfig(c=0.1)).fit(
        features, [bool(row.response_harmful) for row in parts["fit"]]
    )
    logits = score_responses(model, tokenizer, parts["select"], fitted.probe)
    benign = np.flatnonzero([not row.response_harmful for row in parts["select"]])
    monitor = monitor_for(logits, benign, smoothing=2 / 3, start=fitted.benign_mean)
    harmless = as_own(
        model, tokenizer, (row for row in parts["calibrate"] if not row.response_harmful), cap=48
    )
    scored = score_responses(model, tokenizer, harmless, fitted.probe)
    calibration = certify_populations(
        [as_benign(row) for row in harmless],
        smoothed_paths(scored, monitor),
        alphas=(0.05,),
        delta=0.05,
        envelope=Envelope(max_new_tokens=48, do_sample=False, temperature=1.0, top_p=1.0, top_k=0),
        responses=Responses.scored(model, scored),
    )
    return ProbeBundle(
        probe=fitted.probe,
        monitor=monitor,
        certificates=calibration.certificates,
        default_alpha=0.05,
        holdback_tokens=2,
        refusal="No.",
        opener="On reflection, ",
        fingerprint=Fingerprint.of(model, tokenizer),
        provenance={"delta": 0.05},
    )


def as_benign(row: Conversation) -> Conversation:
    """Count a row to the population that a bundle cannot do without."""
    return replace(row, meta={**row.meta, "population": "benign"})


def judge(_messages: Any, text: str) -> Any:
    """A judge of whole responses, by `tests.planted:judge`."""
    onset = next((i for i in range(len(text)) if is_harm(text[i : i + 3])), None)
    label = "benign" if onset is None else "harmful"
    return SimpleNamespace(label=label, onset_char=onset)
