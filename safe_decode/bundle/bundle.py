"""The artefact that crosses from the workbench to the runtime.

A directory of three files: card.json (everything readable, with digests of the others and
of itself), probe.safetensors and calibration.safetensors. They are written beside their
places and renamed; other files of the directory are left alone. Nothing in it is believed
when it is read: schema, digests, shapes and ranges are checked, the thresholds must recompute
from the maxima stored beside them, and the caps from the lengths. Digests show damage, not
who wrote the bundle: for that it is signed, see `signing`.

Knows its parts and the disk. Does not know models, hooks or generation.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of

from safe_decode.bundle.canary import CanaryRecord
from safe_decode.bundle.card import calibration_tensors, card_of, parts_of, probe_tensors
from safe_decode.bundle.consistency import require_consistent
from safe_decode.bundle.files import (
    CALIBRATION,
    CARD,
    FILES,
    PROBE,
    SCHEMA,
    card_digest,
    checked_content,
    is_bundle,
    parse_card,
    read_file,
)
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.bundle.measured import MeasuredFormat, measured_of, named
from safe_decode.bundle.notebook import rows_as_html
from safe_decode.bundle.plausible import require_plausible
from safe_decode.bundle.seen import SeenPrompts
from safe_decode.bundle.summary import summary_of
from safe_decode.certificate import Certificate
from safe_decode.certificate_choice import certificate_of
from safe_decode.errors import (
    BundleCorruptError,
    BundleError,
    CertificateError,
    ConfigurationError,
)
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.policy.reasoning import ReasoningSpans
from safe_decode.policy.self_check import HeaderCheck
from safe_decode.probe.interface import Probe
from safe_decode.whole_files import replace_files

__all__ = ["SCHEMA", "Fingerprint", "ProbeBundle"]


@dataclass(frozen=True, eq=False)
class ProbeBundle:
    """A probe with all that makes its alarms mean something.

    Attributes:
        probe: Features to logits.
        monitor: Logits to a statistic.
        certificates: At most one for each (alpha, population, dtype, cap).
        default_alpha: Certified for the population "benign".
        holdback_tokens: A token is released when it and this many after it are judged.
        refusal: Text of the canned refusal.
        opener: First words after a rewind; the model goes on from there.
        fingerprint: Of the model it was made for, in the number format it was made in.
        canary: A known conversation in that format, or None.
        provenance: Where it comes from: data, seeds, versions. JSON values; not judged.
        header_check: A second look at alarms, made for this probe; or None.
        reasoning: Marks of reasoning and the thresholds inside them; or None.
        seen: The prompts it was made from, by split; None: not recorded.
        made: The day on which it was made, as YYYY-MM-DD; None: not recorded. The digest does
            not depend on it.
        further: Other number formats of the same model that it is certified in.

    Raises:
        ConfigurationError: The parts do not fit together.
        CertificateError: A certificate does not recompute, or the default is not certified.
    """

    probe: Probe
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
    seen: SeenPrompts | None = None
    made: str | None = None
    further: tuple[MeasuredFormat, ...] = ()

    def __post_init__(self) -> None:
        """Say of each certificate in which numbers it was measured; check that the parts fit."""
        self._name_formats()
        require_consistent(self)

    def __repr__(self) -> str:
        """Return one line; `summary_of` says more."""
        one = self.certificate()
        return (
            f"ProbeBundle({self.probe.kind} probe for {', '.join(self.probe.heads)}, alpha "
            f"{one.alpha:g}, n {one.n}, up to {one.envelope.max_new_tokens} tokens)"
        )

    def _repr_html_(self) -> str:
        """Draw what people ask first, for a notebook."""
        return rows_as_html(f"Bundle {self.digest[:16]}", summary_of(self).rows())

    def _name_formats(self) -> None:
        own = self.fingerprint.number_format
        object.__setattr__(self, "certificates", named(self.certificates, own))
        for name in ("header_check", "reasoning"):
            part = getattr(self, name)
            if part is not None and any(one.dtype is None for one in part.certificates):
                part = replace(part, certificates=named(part.certificates, own))
                object.__setattr__(self, name, part)

    def certificate(
        self,
        alpha: float | None = None,
        population: str = "benign",
        dtype: str | None = None,
        tokens: int | None = None,
    ) -> Certificate:
        """Return the certificate of a level.

        Args:
            alpha: None for the default.
            population: Whose responses it speaks of.
            dtype: Number format of the model, see `dtypes`; None: the one that the bundle was
                made in.
            tokens: See `certificate_of`; None: that of the largest cap.

        Raises:
            CertificateError: This level is not certified; those that are, are named.
        """
        wanted = self.default_alpha if alpha is None else alpha
        own = self.fingerprint.number_format if dtype is None else dtype
        return certificate_of(self.certificates, wanted, population, own, tokens)

    @property
    def measured(self) -> tuple[MeasuredFormat, ...]:
        """List the number formats it is certified in, the one that it was made in first."""
        return (MeasuredFormat(self.fingerprint, self.canary), *self.further)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Name the number formats it is certified in, the one that it was made in first."""
        return tuple(one.dtype for one in self.measured)

    def measured_as(self, found: Fingerprint) -> MeasuredFormat:
        """Find the number format that a model at hand computes in. Raises as `measured_of`."""
        return measured_of(self.measured, found)

    def only_as(self, found: Fingerprint) -> ProbeBundle:
        """Leave out all number formats but that of a model at hand. Raises as `measured_of`."""
        own = self.measured_as(found)
        return replace(
            self,
            certificates=tuple(one for one in self.certificates if one.dtype == own.dtype),
            fingerprint=own.fingerprint,
            canary=own.canary,
            further=(),
        )

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
        """Write the bundle's files; what was there is replaced only when all are written.

        Args:
            path: A directory; it is created if it is not there. If it holds a bundle, the
                bundle's own files are replaced and all others stay, a signature too, which
                then no longer fits.

        Raises:
            BundleError: Something else is there, or the disk refuses.
            BundleCorruptError: It holds a value that would be refused when it is read.
        """
        target = Path(path)
        if (target.exists() or target.is_symlink()) and not is_bundle(target):
            raise BundleError(f"path={target} exists and is no bundle; pass a new directory.")
        try:
            require_plausible(self)
        except (ConfigurationError, CertificateError) as error:
            raise BundleCorruptError(f"the bundle for {target} is of no use: {error}") from error
        files = self._files()
        contents = {name: files[name] for name in FILES}
        try:
            if target.exists():
                replace_files(target, contents)
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as spot:
                new = Path(spot, "new")
                new.mkdir()
                replace_files(new, contents)
                new.rename(target)
        except OSError as error:
            raise BundleError(f"path={target} cannot be written: {error}.") from error

    @classmethod
    def load(cls, path: str | Path, *, trusted_key: str | Path | None = None) -> ProbeBundle:
        """Read and check a bundle.

        Args:
            path: Its directory, package data included.
            trusted_key: File of the public key that must have signed it; None: the signature,
                if there is one, is not looked at.

        Raises:
            BundleError: There is no bundle.
            SignatureError: It is not signed by this key, or not as it is.
            BundleCorruptError: Truncated, of a foreign schema, changed since it was
                written, not finite, with values that no bundle has, or with parts that do
                not fit.
        """
        source = Path(path)
        if not (source / CARD).is_file():
            raise BundleError(f"path={source} holds no {CARD}; pass the directory of a bundle.")
        try:
            contents = {name: read_file(source, name) for name in FILES}
            if trusted_key is not None:
                from safe_decode.bundle.signing import require_signed

                require_signed(source, trusted_key, contents)
            return _read(source, contents)
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
            OverflowError,
            RecursionError,
        ) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise BundleCorruptError(
                f"bundle {source} is corrupt: {what} (fetch or export the bundle again)."
            ) from error

    def _files(self) -> dict[str, bytes]:
        files = {
            PROBE: bytes_of(probe_tensors(self)),
            CALIBRATION: bytes_of(calibration_tensors(self)),
        }
        card = card_of(self, {name: hashlib.sha256(files[name]).hexdigest() for name in files})
        card = json.loads(json.dumps(card, allow_nan=False))  # as it will be read
        card["digest"] = card_digest(card)
        text = json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False)
        return {CARD: text.encode() + b"\n", **files}


def _read(source: Path, contents: Mapping[str, bytes]) -> ProbeBundle:
    card = parse_card(source, contents[CARD])
    tensors, calibration = (
        tensors_of(checked_content(source, name, card, contents[name]))
        for name in (PROBE, CALIBRATION)
    )
    bundle = ProbeBundle(**parts_of(card, tensors, calibration))
    require_plausible(bundle)
    return bundle
