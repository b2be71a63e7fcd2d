"""Whether the parts of a bundle fit together.

Knows heads, certificates and formats. Does not know whether single values are possible; that is
`plausible`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safe_decode.bundle.measured import require_measured
from safe_decode.errors import CertificateError, ConfigurationError

if TYPE_CHECKING:
    from safe_decode.bundle.bundle import ProbeBundle

__all__ = ["require_consistent"]


def require_consistent(bundle: ProbeBundle) -> None:
    """Check that probe, monitor, canaries and certificates speak of the same.

    Raises:
        ConfigurationError: The parts do not fit together.
        CertificateError: A certificate does not recompute, or the default is not certified.
    """
    require_measured(bundle.measured, bundle.certificates)
    n_heads = len(bundle.probe.heads)
    if len(bundle.monitor.start) != n_heads:
        raise ConfigurationError(
            f"the monitor has {len(bundle.monitor.start)} heads, the probe {n_heads}; fit them "
            "together."
        )
    for canary in [one.canary for one in bundle.measured if one.canary is not None]:
        if canary.logits.shape[1:] != (n_heads,):
            raise ConfigurationError(
                f"the canary's logits are {tuple(canary.logits.shape)}, wanted {n_heads} "
                "heads; record the canary with this probe."
            )
    if bundle.holdback_tokens < 0 or not bundle.refusal.strip() or not bundle.opener.strip():
        raise ConfigurationError(
            f"holdback_tokens={bundle.holdback_tokens} must not be negative, and refusal and "
            "opener must hold text."
        )
    keys = [
        (c.alpha, c.population, c.dtype, c.envelope.max_new_tokens) for c in bundle.certificates
    ]
    if len(set(keys)) != len(keys):
        raise CertificateError(f"certificates {keys} hold one twice; keep one of each.")
    for certificate in bundle.certificates:
        certificate.verify()
    for one in bundle.measured:
        bundle.certificate(dtype=one.dtype)
    if bundle.reasoning is not None and bundle.monitor.hits > 1:
        raise ConfigurationError(
            f"hits={bundle.monitor.hits} mixes values from inside and outside of reasoning; "
            "choose a statistic with hits=1, or leave the spans out."
        )
