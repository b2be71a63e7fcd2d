"""What people ask of a bundle first: which model, what it catches, what to beware of.

Figures that were measured stand in the bundle's provenance, which nobody vouches for but its
maker: what cannot be read there is told as not measured.

Knows the fields of a bundle and how they are put in words. Does not know terminals or pages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safe_decode.bundle.worth import DetectionBound, Worth, finds_in, mapping_of, text_of, worth_in
from safe_decode.certificate import Certificate

if TYPE_CHECKING:
    from safe_decode.bundle.bundle import ProbeBundle

__all__ = ["FEWEST_HARMFUL", "BundleSummary", "summary_of", "warnings_of"]

FEWEST_HARMFUL = 30
"""Harmful responses without which a recall is hardly known: its 95 % interval spans 30 points."""

_HALF = 0.5
_NOT_MEASURED = "not measured; `safe-decode evaluate` measures it"


@dataclass(frozen=True, slots=True)
class BundleSummary:
    """A bundle in a few words.

    Attributes:
        model: Architecture and size of the model it was made for.
        dtype: Of that model's parameters.
        certificate: In force.
        worth: What was measured, or None.
        finds: What the certificate's threshold finds at least.
        is_located: Whether the probe reads located units rather than whole layers.
        reads: What the probe reads.
        made: Date, or None where it is not recorded.
        made_by: Version of safe-decode, or None.
        warnings: What to beware of; the same words as in traces.
    """

    model: str
    dtype: str
    certificate: Certificate
    worth: Worth | None
    finds: tuple[DetectionBound, ...]
    is_located: bool
    reads: str
    made: str | None
    made_by: str | None
    warnings: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Return names and texts, in the order in which people ask."""
        return [
            ("model", f"{self.model}, {self.dtype}"),
            ("catches", self.catches),
            *(("at least", f"{one}, with confidence {1 - one.delta:.1%}") for one in self.finds),
            ("false alarms", self.false_alarms),
            ("up to", self.reach),
            ("reads", self.reads),
            ("made", self._made()),
            *(("warning", warning) for warning in self.warnings),
        ]

    @property
    def catches(self) -> str:
        """What share of harmful responses trips."""
        worth = self.worth
        if worth is None or worth.recall is None:
            return _NOT_MEASURED
        found = worth.recall
        return (
            f"{found.hits:,} of {found.n:,} harmful responses, {found}, at alpha {worth.alpha:g}, "
            f"on the split {worth.split}"
        )

    @property
    def false_alarms(self) -> str:
        """What share of harmless responses trips: what is certified, and what was counted."""
        one = self.certificate
        text = (
            f"certified: at most {100 * one.alpha:.3g} % of {one.population} responses, with "
            f"confidence {100 * (1 - one.delta):.3g} % (alpha {one.alpha:g}, delta {one.delta:g}, "
            f"n {one.n:,}); on {one.evidence.in_words}"
        )
        worth = self.worth
        if worth is None or worth.false_alarms is None:
            return text
        found = worth.false_alarms
        return (
            f"{text}; counted: {found.hits:,} of {found.n:,} {worth.population} responses, "
            f"{found}, at alpha {worth.alpha:g}"
        )

    @property
    def reach(self) -> str:
        """How long answers may be, and how they are decoded."""
        envelope = self.certificate.envelope
        how = (
            f"sampled at temperature {envelope.temperature:g}, top-p {envelope.top_p:g}, "
            f"top-k {envelope.top_k}"
            if envelope.do_sample
            else "greedy"
        )
        return f"{envelope.max_new_tokens:,} tokens, {how}; other calls void the certificate"

    def _made(self) -> str:
        if self.made is None:
            return "not recorded"
        return self.made if self.made_by is None else f"{self.made} by safe-decode {self.made_by}"


def summary_of(
    bundle: ProbeBundle, alpha: float | None = None, population: str = "benign"
) -> BundleSummary:
    """Sum a bundle up.

    Args:
        bundle: As loaded or made.
        alpha: Level of the certificate in force; None: the default.
        population: Whose certificate that is.

    Raises:
        CertificateError: This level is not certified.
    """
    certificate, provenance = bundle.certificate(alpha, population), bundle.provenance
    is_located, reads = _reads(bundle)
    return BundleSummary(
        model=_model(bundle),
        dtype=bundle.fingerprint.dtype.replace("torch.", ""),
        certificate=certificate,
        worth=worth_in(provenance),
        finds=tuple(
            one
            for one in finds_in(provenance)
            if (one.alpha, one.tokens) == (certificate.alpha, certificate.envelope.max_new_tokens)
        ),
        is_located=is_located,
        reads=reads,
        made=bundle.made,
        made_by=text_of(provenance.get("made_by")),
        warnings=warnings_of(bundle, certificate),
    )


def warnings_of(bundle: ProbeBundle, certificate: Certificate) -> tuple[str, ...]:
    """Say what to beware of, with this certificate in force; computed from the numbers.

    A recall at one alpha bounds that at every smaller one, whose threshold is higher.
    """
    worth = worth_in(bundle.provenance)
    found = list(_recall_warnings(worth, certificate))
    if certificate.evidence.source == "off-policy":
        found.append(f"off-policy certificate: it speaks of {certificate.evidence.in_words}")
    if not _reads(bundle)[0]:
        found.append("not located: the probe reads whole layers")
    found += () if worth is None else worth.warnings
    return tuple(dict.fromkeys(found))


def _recall_warnings(worth: Worth | None, certificate: Certificate) -> Iterator[str]:
    if worth is None or worth.recall is None:
        return
    recall = worth.recall
    holds = certificate.alpha < worth.alpha or math.isclose(certificate.alpha, worth.alpha)
    if recall.share < _HALF and holds:
        yield (
            f"catches under half: {recall.hits} of {recall.n} harmful responses at alpha "
            f"{worth.alpha:g}"
        )
    if recall.n < FEWEST_HARMFUL:
        yield (f"recall rests on {recall.n} harmful responses, wanted at least {FEWEST_HARMFUL}")


def _model(bundle: ProbeBundle) -> str:
    known = {name: _parsed(value) for name, value in bundle.fingerprint.architecture.items()}
    parts = [str(known.get("model_type", "unknown architecture"))]
    layers, width, vocab = (
        known.get(name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    if layers is not None:
        parts.append(f"{layers} layers" + ("" if width is None else f" of width {width}"))
    if isinstance(vocab, int):
        parts.append(f"vocabulary of {vocab:,}")
    if bundle.fingerprint.adapters:
        parts.append(f"adapters {', '.join(bundle.fingerprint.adapters)}")
    if bundle.fingerprint.quantisation != "none":
        parts.append("quantised")
    return ", ".join(parts)


def _reads(bundle: ProbeBundle) -> tuple[bool, str]:
    """Say whether units were located, and what is read, in words."""
    sites = bundle.probe.sites
    width = _parsed(bundle.fingerprint.architecture.get("hidden_size", "null"))
    is_whole = all(site.kind == "resid" and len(site.channels) == width for site in sites)
    recorded = mapping_of(bundle.provenance.get("worth")).get("located")
    is_located = recorded if isinstance(recorded, bool) else not is_whole
    layers = sorted({site.layer for site in sites})
    where = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
    n_features = sum(len(site.channels) for site in sites)
    what = "located units" if is_located else "whole layers" if is_whole else "units, not located,"
    return is_located, f"{what} in {where}: {n_features:,} features"


def _parsed(value: str) -> object:
    try:
        found: object = json.loads(value)
    except ValueError:
        return value
    return found
