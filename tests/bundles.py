"""A small bundle for any tiny model, made by arithmetic, not by fitting."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from safe_decode.activations.site import Site, n_features
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.canary import CanaryRecord
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.certificate import Certificate, Envelope
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.probe.linear import LinearProbe

SITES = (Site(0, "mlp", (1, 3, 8)), Site(1, "attn", (4, 5)), Site(2, "resid", (0, 31)))
HEADS = ("request", "response")
ENVELOPE = Envelope(max_new_tokens=64, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)


def random_probe(*, seed: int = 0) -> LinearProbe:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_features(SITES), len(HEADS), generator=generator)
    return LinearProbe(SITES, weight, torch.randn(len(HEADS), generator=generator), HEADS)


def random_bundle(model: Any, tokenizer: Any, **changes: Any) -> ProbeBundle:
    """Two populations, two levels, a canary; `changes` replace fields."""
    rng = np.random.default_rng(0)
    probe = random_probe()
    benign, hard = rng.normal(size=1_000).tolist(), rng.normal(size=500).tolist()
    parts: dict[str, Any] = {
        "probe": probe,
        "monitor": MonitorConfig(
            smoothing=0.3, start=(0.0, 0.1), offset=(0.0, 0.5), scale=(1.0, 2.0), low_mark=-0.5
        ),
        "certificates": tuple(
            Certificate.compute(
                maxima, alpha=alpha, delta=0.05, population=population, envelope=ENVELOPE
            )
            for population, maxima in (("benign", benign), ("hard_negative", hard))
            for alpha in (0.01, 0.05)
        ),
        "default_alpha": 0.01,
        "holdback_tokens": 4,
        "refusal": "I can't help with that.",
        "opener": "On reflection,",
        "fingerprint": Fingerprint.of(model, tokenizer),
        "canary": CanaryRecord.of(
            model, tokenizer, probe, prompt="hello", response="a reply", tolerance=1e-3
        ),
        "provenance": {"seed": 0, "data": ["é"]},
    }
    return ProbeBundle(**{**parts, **changes})
