"""Bundles for tiny models, and thresholds that make some rows trip and not others."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch

from safe_decode.activations.site import Site
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.certificate import Certificate, Envelope
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.probe.linear import LinearProbe
from safe_decode.streaming.threads import IDLE_NAME
from safe_decode.typing import CausalLM, Tokenizer

SITES = (
    Site(0, "mlp", tuple(range(0, 64, 5))),
    Site(1, "resid", tuple(range(8))),
    Site(2, "attn", tuple(range(16))),
)
RESID_SITES = (Site(0, "resid", tuple(range(8))), Site(2, "resid", tuple(range(4, 16))))
"""For models whose experts are fused, so that their neurons cannot be read."""
REFUSAL, OPENER = "I can't help with that.", "I'm sorry,"


def random_probe(seed: int = 3, sites: tuple[Site, ...] = SITES) -> LinearProbe:
    """Draw a probe of one head."""
    n = sum(len(site.channels) for site in sites)
    generator = torch.Generator().manual_seed(seed)
    return LinearProbe(
        sites, torch.randn(n, 1, generator=generator) / n**0.5, torch.zeros(1), ("harm",)
    )


def bundle_for(
    model: CausalLM,
    tokenizer: Tokenizer,
    *,
    threshold: float = 1e9,
    holdback: int = 2,
    **changes: Any,
) -> ProbeBundle:
    """A bundle around a random probe; `threshold` goes into its certificate."""
    certificate = Certificate.compute(
        [threshold] * 20,  # whatever the rank, the threshold is this number
        alpha=0.5,
        delta=0.05,
        population="benign",
        envelope=Envelope(max_new_tokens=64, do_sample=False, temperature=1.0, top_p=1.0, top_k=50),
    )
    bundle = ProbeBundle(
        probe=random_probe(sites=RESID_SITES if "Mixtral" in type(model).__name__ else SITES),
        monitor=MonitorConfig(2 / 5, (0.0,), (0.0,), (1.0,), 0.0),
        certificates=(certificate,),
        default_alpha=0.5,
        holdback_tokens=holdback,
        refusal=REFUSAL,
        opener=OPENER,
        fingerprint=Fingerprint.of(model, tokenizer),
        canary=None,
        provenance={},
    )
    return dataclasses.replace(bundle, **changes)


def decoder_for(
    model: CausalLM,
    tokenizer: Tokenizer,
    *,
    threshold: float = 1e9,
    holdback: int = 2,
    **options: Any,
) -> SafeDecoder:
    """Wrap a tiny model with its bundle; `options` go to the decoder."""
    bundle = bundle_for(model, tokenizer, threshold=threshold, holdback=holdback)
    return SafeDecoder(model, tokenizer, bundle, **options)


def busy_threads() -> int:
    """Count threads, but for those that wait for a next call."""
    return sum(thread.name != IDLE_NAME for thread in threading.enumerate())


def peaks(output: Any) -> list[float]:
    """Each row's largest statistic."""
    return [max(step.statistic for step in trace.steps) for trace in output.traces]


def threshold_between(values: list[float]) -> float:
    """A threshold that about half of the rows exceed, in the middle of the widest gap there."""
    ordered = sorted(set(values))
    middle = range(max(1, len(ordered) // 3), max(2, len(ordered) - 1))
    gap = max(middle, key=lambda i: ordered[i] - ordered[i - 1])
    return (ordered[gap] + ordered[gap - 1]) / 2
