"""In which numbers a bundle was measured, and which of them a model at hand computes in.

A bundle is certified in the number format of the model that it was made for; the same model in
another one rounds otherwise, so its scores, and how often it alarms, are others. Each further
format has a fingerprint, a canary and certificates of its own.

Knows fingerprints and their differences. Does not know the disk, or how scores come about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from safe_decode.bundle.canary import CanaryRecord
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.bundle.number_format import flags_for
from safe_decode.certificate import Certificate
from safe_decode.errors import CertificateError, FingerprintMismatchError

__all__ = [
    "MeasuredFormat",
    "measured_of",
    "named",
    "require_certified",
    "require_measured",
    "require_same_model",
]

_OF_THE_FORMAT = ("weights", "quantisation", "dtype")
"""What of a fingerprint differs where the same model is loaded in other numbers."""


@dataclass(frozen=True, eq=False)
class MeasuredFormat:
    """One number format in which a bundle was measured.

    Attributes:
        fingerprint: Of the model, loaded in this format.
        canary: A known conversation as it is scored in this format, or None.
    """

    fingerprint: Fingerprint
    canary: CanaryRecord | None = None

    @property
    def dtype(self) -> str:
        """The format's name, see `bundle.number_format`."""
        return self.fingerprint.number_format


def measured_of(measured: Sequence[MeasuredFormat], found: Fingerprint) -> MeasuredFormat:
    """Find the format that a model at hand computes in.

    Args:
        measured: Of the bundle, the one that it was made in first.
        found: Of the model at hand.

    Raises:
        FingerprintMismatchError: The model is another, or the bundle was not measured in its
            format; the message names those that it was.
    """
    for one in measured:
        if one.dtype == found.number_format:
            one.fingerprint.require(found)
            return one
    require_same_model(measured[0].fingerprint, found)
    raise _uncertified([one.dtype for one in measured], found.number_format)


def require_certified(names: Sequence[str], dtype: str) -> None:
    """Check, before weights are read, that a model of a dtype can be one of those certified.

    Args:
        names: Number formats of the bundle.
        dtype: Of the weights that will be read. Some parameters may be kept in another one.

    Raises:
        FingerprintMismatchError: No format of the bundle has weights of this dtype.
    """
    if not any(dtype in name.split("+") for name in names):
        raise _uncertified(names, dtype)


def _uncertified(names: Sequence[str], found: str) -> FingerprintMismatchError:
    """Say that a number format is not certified, which are, and what to do."""
    ways = " or ".join(dict.fromkeys(flags_for(name) for name in names))
    return FingerprintMismatchError(
        f"dtype={found} is not certified: the bundle holds certificates for "
        f"{', '.join(names)} alone, and other numbers move the scores; load the model in one of "
        f"these ({ways}), or certify this one with `safe-decode calibrate "
        f"{flags_for(found)}`."
    )


def require_measured(
    measured: Sequence[MeasuredFormat], certificates: Sequence[Certificate]
) -> None:
    """Check that formats, and the certificates measured in them, belong together.

    Raises:
        CertificateError: A format is there twice, a certificate names one that is not there, or
            the formats are not of one model.
    """
    names = [one.dtype for one in measured]
    foreign = sorted({str(c.dtype) for c in certificates} - set(names))
    if foreign or len(set(names)) != len(names):
        raise CertificateError(
            f"certificates for dtype {', '.join(foreign or names)} stand beside fingerprints of "
            f"{', '.join(names)}, wanted one fingerprint each; calibrate again."
        )
    for one in measured[1:]:
        lines = measured[0].fingerprint.differences(one.fingerprint, but=_OF_THE_FORMAT)
        if lines:
            raise CertificateError(
                f"the fingerprint for dtype {one.dtype} is of another model: {'; '.join(lines)}; "
                "calibrate again."
            )


def named(certificates: Sequence[Certificate], dtype: str) -> tuple[Certificate, ...]:
    """Name a number format in the certificates that name none."""
    return tuple(replace(one, dtype=dtype) if one.dtype is None else one for one in certificates)


def require_same_model(made_for: Fingerprint, found: Fingerprint) -> None:
    """Check all of a fingerprint that another number format does not change.

    Args:
        made_for: Of the bundle.
        found: Of the model at hand, in whichever format.

    Raises:
        FingerprintMismatchError: Something differs; all that does is named.
    """
    differing = made_for.differences(found, but=_OF_THE_FORMAT)
    if differing:
        raise FingerprintMismatchError(
            f"the bundle was made for another model: {'; '.join(differing)}, and dtype is "
            f"{found.number_format}, wanted {made_for.number_format}; load the model and tokenizer "
            "it was made for, or make a bundle for this one."
        )
