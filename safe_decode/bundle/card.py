"""How the parts of a bundle are written as a card and tensors, and read back.

Numbers that people read stand in the card; weights, maxima and lengths are tensors. What a
bundle does not have is not in its card, so that readers of its schema still read it.

Knows entries and names of tensors. Does not know the disk, or whether the values are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safe_decode.activations.site import Site
from safe_decode.bundle.canary import CanaryRecord
from safe_decode.bundle.certificate_card import CertificateSets, certificates_of
from safe_decode.bundle.files import (
    FORMAT,
    SCHEMA,
    WITH_EVIDENCE,
    WITH_FURTHER,
    WITH_KIND,
    WITH_PAST,
    tupled,
)
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.bundle.measured import MeasuredFormat
from safe_decode.bundle.probe_card import layout_in, probe_record, probe_tensors_in
from safe_decode.bundle.seen import SeenPrompts
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.policy.reasoning import ReasoningSpans
from safe_decode.policy.self_check import HeaderCheck
from safe_decode.probe.interface import Probe
from safe_decode.probe.registry import probe_class

if TYPE_CHECKING:
    from safe_decode.bundle.bundle import ProbeBundle

__all__ = ["calibration_tensors", "card_of", "parts_of", "probe_tensors"]

_HEADER = "header_"
"""Stands before the names of the tensors of a self-check's probe."""


def probe_tensors(bundle: ProbeBundle) -> dict[str, Tensor]:
    """Return the tensors of the probes and the canary's logits, by name."""
    tensors = bundle.probe.tensors()
    if bundle.header_check is not None:
        own = bundle.header_check.probe.tensors()
        tensors |= {f"{_HEADER}{name}": tensor for name, tensor in own.items()}
    for number, one in enumerate(bundle.measured):
        if one.canary is not None:
            tensors[_canary_tensor(number)] = one.canary.logits
    # Copied: safetensors refuses tensors that share memory, as those of one probe in two places do.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def calibration_tensors(bundle: ProbeBundle) -> dict[str, Tensor]:
    """Return what the thresholds and caps are recomputed from, by name.

    Certificates of several alphas share their responses; each set is stored once.
    """
    sets = _sets(bundle)
    tensors = {
        f"maxima_{number}": torch.tensor(maxima, dtype=torch.float64)
        for number, maxima in enumerate(sets.maxima)
    }
    for number, evidence in enumerate(sets.evidence):
        tensors[f"lengths_{number}"] = torch.tensor(evidence.lengths, dtype=torch.int64)
        tensors[f"reaches_{number}"] = torch.tensor(evidence.reaches, dtype=torch.int64)
    if bundle.seen is not None:
        tensors["seen_digests"] = torch.tensor(bundle.seen.digests, dtype=torch.int64)
        tensors["seen_places"] = torch.tensor(bundle.seen.places, dtype=torch.uint8)
    return tensors


def card_of(bundle: ProbeBundle, digests: Mapping[str, str]) -> dict[str, Any]:
    """Write the card, but for its own digest.

    Args:
        bundle: Whose card.
        digests: Sha256 of the other files, by name.
    """
    sets = _sets(bundle)
    further: dict[str, Any] = {}
    if bundle.further:
        further["formats"] = [
            {"fingerprint": asdict(one.fingerprint), "canary": _canary_record(one.canary)}
            for one in bundle.further
        ]
    if bundle.header_check is not None:
        further["header_check"] = _header_record(bundle.header_check, sets)
    if bundle.reasoning is not None:
        further["reasoning"] = {
            "opens": bundle.reasoning.opens,
            "closes": bundle.reasoning.closes,
            "certificates": [sets.record(one) for one in bundle.reasoning.certificates],
        }
    further |= probe_record(bundle.probe)
    if bundle.seen is not None:
        further["seen_splits"] = bundle.seen.splits
    if bundle.made is not None:
        further["made"] = bundle.made
    return {
        **further,
        "format": FORMAT,
        "schema": _schema(bundle, sets),
        "files": dict(digests),
        "sites": [asdict(site) for site in bundle.probe.sites],
        "heads": bundle.probe.heads,
        "monitor": _monitor_record(bundle.monitor),
        "certificates": [sets.record(one) for one in bundle.certificates],
        "default_alpha": bundle.default_alpha,
        "holdback_tokens": bundle.holdback_tokens,
        "refusal": bundle.refusal,
        "opener": bundle.opener,
        "fingerprint": asdict(bundle.fingerprint),
        "canary": _canary_record(bundle.canary),
        "provenance": dict(bundle.provenance),
    }


def parts_of(
    card: Mapping[str, Any], tensors: Mapping[str, Tensor], calibration: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Read the fields of a bundle.

    Args:
        card: As `card_of` writes it.
        tensors: As `probe_tensors`.
        calibration: As `calibration_tensors`.

    Raises:
        KeyError, TypeError, ValueError, SafeDecodeError: An entry is missing or of no use.
    """
    fingerprint = fingerprint_in(card)
    dtype = fingerprint.number_format
    return {
        "probe": _probe(card, tensors),
        "monitor": MonitorConfig(**{k: tupled(v) for k, v in card["monitor"].items()}),
        "certificates": certificates_of(card["certificates"], calibration, dtype),
        "default_alpha": card["default_alpha"],
        "holdback_tokens": card["holdback_tokens"],
        "refusal": card["refusal"],
        "opener": card["opener"],
        "fingerprint": fingerprint,
        "canary": _canary(card["canary"], tensors, 0),
        "provenance": card["provenance"],
        "header_check": _header_check(card.get("header_check"), tensors, calibration, dtype),
        "reasoning": _reasoning(card.get("reasoning"), calibration, dtype),
        "seen": _seen(card.get("seen_splits"), calibration),
        "made": card.get("made"),
        "further": tuple(
            MeasuredFormat(fingerprint_in(one), _canary(one["canary"], tensors, number))
            for number, one in enumerate(card.get("formats", ()), 1)
        ),
    }


def fingerprint_in(record: Mapping[str, Any]) -> Fingerprint:
    """Read the fingerprint of a card, or of one of its further formats."""
    return Fingerprint(**{k: tupled(v) for k, v in record["fingerprint"].items()})


def _sets(bundle: ProbeBundle) -> CertificateSets:
    return CertificateSets(bundle.all_certificates, bundle.fingerprint.number_format)


def _canary_tensor(number: int) -> str:
    return f"canary_{number}" if number else "canary"


def _canary_record(canary: CanaryRecord | None) -> dict[str, Any] | None:
    if canary is None:
        return None
    names = ("prompt", "response", "ids", "turn_start", "tolerance")
    return {name: getattr(canary, name) for name in names}


def _canary(
    record: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], number: int
) -> CanaryRecord | None:
    if not record:
        return None
    values = {name: tupled(value) for name, value in record.items()}
    return CanaryRecord(logits=tensors[_canary_tensor(number)], **values)


def _monitor_record(monitor: MonitorConfig) -> dict[str, Any]:
    """Write what readers of earlier schemas know, and the rest where it means something."""
    record = asdict(monitor)
    if monitor.kind != "top":
        del record["best"]
    if not monitor.boundary:
        del record["boundary"], record["boundary_at"]
    return record


def _schema(bundle: ProbeBundle, sets: CertificateSets) -> int:
    """Return the lowest schema whose readers read this bundle whole."""
    check = bundle.header_check
    monitor = bundle.monitor
    is_new = (
        monitor.kind in ("shrunk", "top", "bank") or bool(monitor.boundary) or bool(bundle.further)
    )
    if is_new or bundle.seen is not None or bundle.made is not None:
        return WITH_PAST
    if any(probe_record(own.probe) for own in (bundle, check) if own is not None):
        return WITH_KIND
    if sets.evidence:
        return WITH_EVIDENCE
    return SCHEMA if check is None and bundle.reasoning is None else WITH_FURTHER


def _probe(record: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> Probe:
    sites = tuple(Site(s["layer"], s["kind"], tuple(s["channels"])) for s in record["sites"])
    own = probe_tensors_in(record, tensors, prefix=prefix)
    return probe_class(layout_in(record).kind).from_tensors(sites, own, tuple(record["heads"]))


def _header_record(check: HeaderCheck, sets: CertificateSets) -> dict[str, Any]:
    return {
        "sites": [asdict(site) for site in check.probe.sites],
        "heads": check.probe.heads,
        **probe_record(check.probe),
        "first_threshold": check.first_threshold,
        "every_tokens": check.every_tokens,
        "max_looks": check.max_looks,
        "certificates": [sets.record(one) for one in check.certificates],
    }


def _header_check(
    record: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    calibration: Mapping[str, Tensor],
    dtype: str,
) -> HeaderCheck | None:
    if record is None:
        return None
    return HeaderCheck(
        _probe(record, tensors, _HEADER),
        record["first_threshold"],
        certificates_of(record["certificates"], calibration, dtype),
        every_tokens=record["every_tokens"],
        max_looks=record["max_looks"],
    )


def _seen(splits: object, calibration: Mapping[str, Tensor]) -> SeenPrompts | None:
    if splits is None:
        return None
    digests, places = (calibration[f"seen_{name}"].tolist() for name in ("digests", "places"))
    return SeenPrompts(tupled(splits), tuple(digests), tuple(places))


def _reasoning(
    record: Mapping[str, Any] | None, calibration: Mapping[str, Tensor], dtype: str
) -> ReasoningSpans | None:
    if record is None:
        return None
    certificates = certificates_of(record["certificates"], calibration, dtype)
    return ReasoningSpans(record["opens"], record["closes"], certificates)
