"""A certificate as an entry of a bundle's card, beside the arrays it is recomputed from.

Knows names of entries and arrays, of torch or of NumPy. Does not know the disk, or whether
the values are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from safe_decode.certificate import Certificate, Envelope
from safe_decode.errors import CertificateError
from safe_decode.evidence import UNRECORDED, Evidence

__all__ = ["CertificateSets", "certificates_of"]

_EVIDENCE = ("source", "lengths", "reaches")


class CertificateSets:
    """The distinct maxima and lengths of a bundle's certificates, each stored once.

    Args:
        certificates: All of the bundle.
        dtype: Number format that the bundle was made in; certificates of it do not name it, so
            that older readers still read them.

    Attributes:
        maxima: Stored as `maxima_0`, `maxima_1`, ...
        evidence: Stored as `lengths_0` and `reaches_0`, ...; recorded ones alone.
    """

    def __init__(self, certificates: Iterable[Certificate], dtype: str) -> None:
        self._dtype = dtype
        every = tuple(certificates)
        self.maxima = list(dict.fromkeys(one.maxima for one in every))
        recorded = (one.evidence for one in every if one.evidence.is_recorded)
        self.evidence = list(dict.fromkeys(recorded))

    def record(self, certificate: Certificate) -> dict[str, Any]:
        """Write an entry of the card, which names its arrays."""
        values = asdict(certificate)
        del values["evidence"]
        if certificate.dtype == self._dtype:
            del values["dtype"]
        if not certificate.envelope.options:
            del values["envelope"]["options"]  # so that older readers still read it
        values["maxima"] = f"maxima_{self.maxima.index(certificate.maxima)}"
        if certificate.evidence.is_recorded:
            number = self.evidence.index(certificate.evidence)
            values["source"] = certificate.evidence.source
            values |= {name: f"{name}_{number}" for name in ("lengths", "reaches")}
        return values


def certificates_of(
    records: Iterable[Mapping[str, Any]], arrays: Mapping[str, Any], dtype: str
) -> tuple[Certificate, ...]:
    """Read certificates back.

    Args:
        records: As `CertificateSets.record` writes them.
        arrays: By name, with `tolist`.
        dtype: Number format that the bundle was made in: that of records which name none.

    Raises:
        KeyError, TypeError: An entry or an array is missing, or of another type.
        CertificateError: The evidence is incomplete or impossible.
    """
    return tuple(_certificate({"dtype": dtype, **record}, arrays) for record in records)


def _certificate(record: Mapping[str, Any], arrays: Mapping[str, Any]) -> Certificate:
    values = {**record, "envelope": Envelope(**record["envelope"])}
    values["maxima"] = tuple(arrays[record["maxima"]].tolist())
    named = {name: values.pop(name, None) for name in _EVIDENCE}
    given = [name for name, value in named.items() if value is not None]
    if not given:
        return Certificate(**values, evidence=UNRECORDED)
    if len(given) < len(_EVIDENCE):
        raise CertificateError(
            f"a certificate records {' and '.join(given)} alone, wanted {', '.join(_EVIDENCE)} "
            "together; calibrate again."
        )
    lengths, reaches = (
        tuple(_tokens(name, value) for value in arrays[named[name]].tolist())
        for name in ("lengths", "reaches")
    )
    return Certificate(**values, evidence=Evidence(named["source"], lengths, reaches))


def _tokens(name: str, value: float) -> int:
    if value != value or value in (float("inf"), -float("inf")) or int(value) != value:
        raise CertificateError(f"{name} hold {value}, wanted whole numbers; calibrate again.")
    return int(value)
