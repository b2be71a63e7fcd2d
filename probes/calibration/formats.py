"""Certificates in a further number format, beside those that a bundle has.

Knows bundles, and the same model in other numbers. Does not know how maxima are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from probes.calibration.canary import canary_again
from safe_decode.bundle.bundle import Fingerprint, ProbeBundle
from safe_decode.bundle.measured import MeasuredFormat, named, require_same_model
from safe_decode.certificate import Certificate
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["measured_for", "require_default", "with_certificates"]


def measured_for(bundle: ProbeBundle, model: CausalLM, tokenizer: Tokenizer) -> MeasuredFormat:
    """Find, or make, the entry of a bundle for the number format of its model as it is loaded.

    Args:
        bundle: Made for this model, in this format or another.
        model: In eval mode.
        tokenizer: Its tokenizer.

    Raises:
        FingerprintMismatchError: It is another model.
        CanaryError: In another format, its scores are not those of the bundle's model but for
            rounding.
        UnsupportedError: The bundle has no canary to tell that by, or has thresholds for
            reasoning, which are of one format.
    """
    found = Fingerprint.of(model, tokenizer)
    if found.number_format in bundle.dtypes:
        return bundle.measured_as(found)
    require_same_model(bundle.fingerprint, found)
    if bundle.reasoning is not None:
        raise UnsupportedError(
            f"dtype={found.number_format} is refused for a bundle with thresholds for reasoning, "
            f"which hold in {bundle.dtypes[0]} alone; make a bundle for this format with "
            "`safe-decode fit`."
        )
    if bundle.canary is None:
        raise UnsupportedError(
            f"dtype={found.number_format} is refused for a bundle without a canary: nothing shows "
            "that this is its model in other numbers; make a bundle with `safe-decode fit`."
        )
    canary = canary_again(model, tokenizer, bundle.canary, bundle.probe, bundle.monitor)
    return MeasuredFormat(found, canary)


def require_default(bundle: ProbeBundle, dtype: str, alphas: Sequence[float] | None) -> None:
    """Check, before any work, that one default level will be certified in every format.

    Args:
        bundle: As it is.
        dtype: Format that is certified next.
        alphas: Levels that are certified, the first becomes the default; None: as before.

    Raises:
        ConfigurationError: Certificates of another format, which stay, lack that level.
    """
    if not alphas:
        return
    for other in bundle.dtypes:
        levels = sorted(
            {c.alpha for c in bundle.certificates if (c.population, c.dtype) == ("benign", other)}
        )
        if other != dtype and not any(math.isclose(alphas[0], level) for level in levels):
            raise ConfigurationError(
                f"--alpha={alphas[0]:g} comes first and becomes the default, but in {other}, whose "
                f"certificates stay, only {levels} are certified; pass one of these first."
            )


def with_certificates(
    bundle: ProbeBundle,
    measured: MeasuredFormat,
    certificates: Sequence[Certificate],
    *,
    default_alpha: float,
    provenance: Mapping[str, Any],
) -> ProbeBundle:
    """Put certificates of one format in place of those it had; those of others stay.

    Args:
        bundle: As it was.
        measured: The format, from `measured_for`.
        certificates: Measured in it; they need not name it.
        default_alpha: Certified in every format.
        provenance: Of the new bundle.
    """
    kept = [one for one in bundle.certificates if one.dtype != measured.dtype]
    new = named(certificates, measured.dtype)
    is_new = measured.dtype not in bundle.dtypes
    of_own = measured.dtype == bundle.dtypes[0]
    return replace(
        bundle,
        certificates=(*new, *kept) if of_own else (*kept, *new),
        default_alpha=default_alpha,
        further=(*bundle.further, measured) if is_new else bundle.further,
        provenance=provenance,
    )
