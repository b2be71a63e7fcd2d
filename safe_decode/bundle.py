"""The artefact that crosses from the workbench to the runtime.

A directory of three files: card.json (everything readable, with digests of the others and
of itself), probe.safetensors and calibration.safetensors. It is written beside its place
and renamed. Nothing in it is believed when it is read: schema, digests, shapes, finiteness
are checked, and the thresholds must recompute from the maxima stored beside them.

Knows its parts and the disk. Does not know models, hooks or generation.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from safe_decode.bundle_files import (
    CALIBRATION,
    CARD,
    FORMAT,
    PROBE,
    SCHEMA,
    card_digest,
    checked_content,
    read_card,
    tupled,
)
from safe_decode.canary import CanaryRecord
from safe_decode.certificate import Certificate, Envelope, certificate_of
from safe_decode.errors import (
    BundleCorruptError,
    BundleError,
    CertificateError,
    ConfigurationError,
)
from safe_decode.fingerprint import Fingerprint
from safe_decode.monitor import MonitorConfig
from safe_decode.probe import LinearProbe
from safe_decode.selfcheck import HeaderCheck
from safe_decode.sites import Site
from safe_decode.spans import ReasoningSpans

__all__ = ["SCHEMA", "Fingerprint", "ProbeBundle"]


@dataclass(frozen=True, eq=False)
class ProbeBundle:
    """A probe with all that makes its alarms mean something.

    Attributes:
        probe: Features to logits.
        monitor: Logits to a statistic.
        certificates: At most one for each (alpha, population).
        default_alpha: Certified for the population "benign".
        holdback_tokens: A token is released when it and this many after it are judged.
        refusal: Text of the canned refusal.
        opener: First words after a rewind; the model goes on from there.
        fingerprint: Of the model it was made for.
        canary: A known conversation, or None.
        provenance: Where it comes from: data, seeds, versions. JSON values; not judged.
        header_check: A second look at alarms, made for this probe; or None.
        reasoning: Marks of reasoning and the thresholds inside them; or None.

    Raises:
        ConfigurationError: The parts do not fit together.
        CertificateError: A certificate does not recompute, or the default is not certified.
    """

    probe: LinearProbe
    monitor: MonitorConfig
    certificates: tuple[Certificate, ...]
    default_alpha: float
    holdback_tokens: int
    refusal: str
    opener: str
    fingerprint: Fingerprint
    canary: CanaryRecord | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    header_check: HeaderCheck | None = None
    reasoning: ReasoningSpans | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        n_heads = len(self.probe.heads)
        if len(self.monitor.start) != n_heads:
            raise ConfigurationError(
                f"the monitor has {len(self.monitor.start)} heads, the probe {n_heads}; fit them "
                "together."
            )
        if self.canary is not None and self.canary.logits.shape[1:] != (n_heads,):
            raise ConfigurationError(
                f"the canary's logits are {tuple(self.canary.logits.shape)}, wanted {n_heads} "
                "heads; record the canary with this probe."
            )
        if self.holdback_tokens < 0 or not self.refusal.strip() or not self.opener.strip():
            raise ConfigurationError(
                f"holdback_tokens={self.holdback_tokens} must not be negative, and refusal and "
                "opener must hold text."
            )
        keys = [(c.alpha, c.population) for c in self.certificates]
        if len(set(keys)) != len(keys):
            raise CertificateError(f"certificates {keys} hold one twice; keep one of each.")
        for certificate in self.certificates:
            certificate.verify()
        self.certificate()
        if self.reasoning is not None and self.monitor.hits > 1:
            raise ConfigurationError(
                f"hits={self.monitor.hits} mixes values from inside and outside of reasoning; "
                "choose a statistic with hits=1, or leave the spans out."
            )

    def certificate(self, alpha: float | None = None, population: str = "benign") -> Certificate:
        """Return the certificate of a level.

        Args:
            alpha: None for the default.
            population: Whose responses it speaks of.

        Raises:
            CertificateError: This level is not certified; those that are, are named.
        """
        wanted = self.default_alpha if alpha is None else alpha
        return certificate_of(self.certificates, wanted, population)

    @property
    def all_certificates(self) -> tuple[Certificate, ...]:
        """List those of the statistic, then of the looks, then of reasoning."""
        parts = (self.header_check, self.reasoning)
        further = (own for part in parts if part is not None for own in part.certificates)
        return (*self.certificates, *further)

    @cached_property
    def digest(self) -> str:
        """Sha256 of the card's content, which holds those of the other files."""
        return str(json.loads(self._files()[CARD])["digest"])

    def save(self, path: str | Path) -> None:
        """Write the bundle; what was there is replaced only when all is written.

        Args:
            path: A directory; it is created, or replaced if it holds a bundle.

        Raises:
            BundleError: Something else is there, or the disk refuses.
        """
        target = Path(path)
        if target.exists() and not (target / CARD).is_file():
            raise BundleError(f"path={target} exists and is no bundle; pass a new directory.")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as spot:
                new, old = Path(spot, "new"), Path(spot, "old")
                new.mkdir()
                for name, content in self._files().items():
                    (new / name).write_bytes(content)
                if target.exists():
                    target.rename(old)
                try:
                    new.rename(target)
                except OSError:
                    if old.exists():
                        old.rename(target)
                    raise
        except OSError as error:
            raise BundleError(f"path={target} cannot be written: {error}.") from error

    @classmethod
    def load(cls, path: str | Path) -> ProbeBundle:
        """Read and check a bundle.

        Args:
            path: Its directory, package data included.

        Raises:
            BundleError: There is no bundle.
            BundleCorruptError: Truncated, of a foreign schema, changed since it was
                written, not finite, or with parts that do not fit.
        """
        source = Path(path)
        if not (source / CARD).is_file():
            raise BundleError(f"path={source} holds no {CARD}; pass the directory of a bundle.")
        try:
            return _read(source)
        except BundleCorruptError:
            raise
        except (
            OSError,
            SafetensorError,
            ConfigurationError,
            CertificateError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise BundleCorruptError(
                f"bundle {source} is corrupt: {what} (fetch or export the bundle again)."
            ) from error

    def _files(self) -> dict[str, bytes]:
        tensors = {"weight": self.probe.weight, "bias": self.probe.bias}
        if self.header_check is not None:
            own = self.header_check.probe
            tensors |= {"header_weight": own.weight, "header_bias": own.bias}
        if self.canary is not None:
            tensors["canary"] = self.canary.logits
        files = {
            PROBE: bytes_of({name: t.detach().cpu().contiguous() for name, t in tensors.items()}),
            CALIBRATION: bytes_of(_distinct_maxima(self.all_certificates)),
        }
        card = _card(self, {name: hashlib.sha256(files[name]).hexdigest() for name in files})
        card = json.loads(json.dumps(card, allow_nan=False))  # as it will be read
        card["digest"] = card_digest(card)
        text = json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False)
        return {CARD: text.encode() + b"\n", **files}


def _distinct_maxima(certificates: tuple[Certificate, ...]) -> dict[str, Tensor]:
    # Certificates of several alphas share their maxima; each set is stored once.
    sets = dict.fromkeys(certificate.maxima for certificate in certificates)
    return {
        f"maxima_{number}": torch.tensor(maxima, dtype=torch.float64)
        for number, maxima in enumerate(sets)
    }


def _card(bundle: ProbeBundle, digests: Mapping[str, str]) -> dict[str, Any]:
    sets = list(dict.fromkeys(one.maxima for one in bundle.all_certificates))
    canary = None
    if bundle.canary is not None:
        canary = {
            name: getattr(bundle.canary, name)
            for name in ("prompt", "response", "ids", "turn_start", "tolerance")
        }
    # What a bundle does not have is not in its card, so that older readers still read it.
    further: dict[str, Any] = {}
    if bundle.header_check is not None:
        further["header_check"] = _header_record(bundle.header_check, sets)
    if bundle.reasoning is not None:
        further["reasoning"] = {
            "opens": bundle.reasoning.opens,
            "closes": bundle.reasoning.closes,
            "certificates": [_certificate_record(c, sets) for c in bundle.reasoning.certificates],
        }
    return {
        **further,
        "format": FORMAT,
        "schema": SCHEMA + 1 if further else SCHEMA,
        "files": dict(digests),
        "sites": [asdict(site) for site in bundle.probe.sites],
        "heads": bundle.probe.heads,
        "monitor": asdict(bundle.monitor),
        "certificates": [_certificate_record(one, sets) for one in bundle.certificates],
        "default_alpha": bundle.default_alpha,
        "holdback_tokens": bundle.holdback_tokens,
        "refusal": bundle.refusal,
        "opener": bundle.opener,
        "fingerprint": asdict(bundle.fingerprint),
        "canary": canary,
        "provenance": dict(bundle.provenance),
    }


def _read(source: Path) -> ProbeBundle:
    card = read_card(source)
    tensors = tensors_of(checked_content(source, PROBE, card))
    maxima = tensors_of(checked_content(source, CALIBRATION, card))
    sites = tuple(Site(s["layer"], s["kind"], tuple(s["channels"])) for s in card["sites"])
    canary = card["canary"]
    return ProbeBundle(
        probe=LinearProbe(sites, tensors["weight"], tensors["bias"], tuple(card["heads"])),
        monitor=MonitorConfig(**{k: tupled(v) for k, v in card["monitor"].items()}),
        certificates=tuple(_certificate(record, maxima) for record in card["certificates"]),
        default_alpha=card["default_alpha"],
        holdback_tokens=card["holdback_tokens"],
        refusal=card["refusal"],
        opener=card["opener"],
        fingerprint=Fingerprint(**{k: tupled(v) for k, v in card["fingerprint"].items()}),
        canary=canary
        and CanaryRecord(
            logits=tensors["canary"], **{name: tupled(value) for name, value in canary.items()}
        ),
        provenance=card["provenance"],
        header_check=_header_check(card.get("header_check"), tensors, maxima),
        reasoning=_reasoning(card.get("reasoning"), maxima),
    )


def _reasoning(
    record: Mapping[str, Any] | None, maxima: Mapping[str, Tensor]
) -> ReasoningSpans | None:
    if record is None:
        return None
    certificates = tuple(_certificate(one, maxima) for one in record["certificates"])
    return ReasoningSpans(record["opens"], record["closes"], certificates)


def _certificate_record(certificate: Certificate, sets: list[tuple[float, ...]]) -> dict[str, Any]:
    record = {**asdict(certificate), "maxima": f"maxima_{sets.index(certificate.maxima)}"}
    if not certificate.envelope.options:
        del record["envelope"]["options"]  # so that older readers still read it
    return record


def _header_record(check: HeaderCheck, sets: list[tuple[float, ...]]) -> dict[str, Any]:
    return {
        "sites": [asdict(site) for site in check.probe.sites],
        "heads": check.probe.heads,
        "first_threshold": check.first_threshold,
        "every_tokens": check.every_tokens,
        "max_looks": check.max_looks,
        "certificates": [_certificate_record(one, sets) for one in check.certificates],
    }


def _header_check(
    record: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], maxima: Mapping[str, Tensor]
) -> HeaderCheck | None:
    if record is None:
        return None
    sites = tuple(Site(s["layer"], s["kind"], tuple(s["channels"])) for s in record["sites"])
    return HeaderCheck(
        LinearProbe(
            sites, tensors["header_weight"], tensors["header_bias"], tuple(record["heads"])
        ),
        record["first_threshold"],
        tuple(_certificate(one, maxima) for one in record["certificates"]),
        every_tokens=record["every_tokens"],
        max_looks=record["max_looks"],
    )


def _certificate(record: Mapping[str, Any], maxima: Mapping[str, Tensor]) -> Certificate:
    values = {**record, "envelope": Envelope(**record["envelope"])}
    values["maxima"] = tuple(maxima[record["maxima"]].tolist())
    return Certificate(**values)
