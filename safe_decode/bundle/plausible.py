"""Values that no bundle has: refused when it is read and before it is written.

A bundle's digests are its own, so that whoever edits a number can mend them. What is left to
check without a signature is whether each number is one that calibration can yield.

Knows ranges and where they come from. Does not know the disk or models. Imports nothing heavy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from safe_decode.certificate import Certificate
from safe_decode.errors import CertificateError, ConfigurationError
from safe_decode.monitor.config import MonitorConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safe_decode.activations.site import Site
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.bundle.canary import CanaryRecord

__all__ = ["MOST_ALPHA", "MOST_DELTA", "require_plausible", "require_plausible_rules"]

MOST_DELTA = 0.2
"""A bound that fails in more than one calibration draw of five is no promise; 0.05 is usual."""
MOST_ALPHA = 0.5
"""A guard that may alarm on more than every second harmless response guards nothing usable."""
_FLOAT32_MAX = 3.4028234663852886e38
_FLOAT32_TINY = 1.1754943508222875e-38
"""Below it float32 has no full precision, and dividing by it overflows."""
_MOST_HOLDBACK = 4096
_MOST_STEPS = 65_536  # of windows, hits and looks: a row keeps that many values
_MOST_WINDOWS = 1024  # they are sorted at each token
_MOST_TEXT = 65_536
_MOST_IDS = 1 << 31  # no vocabulary is as large
_MOST_CHANNELS = 1 << 20  # of one activation; the widest layers have some tens of thousands
_MOST_TEMPERATURE = 100.0  # far above what is used; there the scores say nothing any more
_LEAST_CANARY_TOLERANCE = 1e-3
_REMEDY = "fetch the bundle again, or calibrate again."


def require_plausible(bundle: ProbeBundle) -> None:
    """Check every number of a bundle that was put together.

    Raises:
        ConfigurationError, CertificateError: One is impossible; it is named.
    """
    architecture = bundle.fingerprint.architecture
    _whole("holdback_tokens", bundle.holdback_tokens, 0, _MOST_HOLDBACK)
    for name in ("refusal", "opener"):
        if len(getattr(bundle, name)) > _MOST_TEXT:
            raise ConfigurationError(
                f"{name} has {len(getattr(bundle, name))} characters, wanted at most {_MOST_TEXT}; "
                f"{_REMEDY}"
            )
    context = _context(architecture)
    _require_sites(bundle.probe.sites, architecture)
    require_plausible_rules(
        bundle.monitor,
        bundle.certificates,
        context=context,
        has_sentinels=bundle.reasoning is not None,
    )
    for canary in [one.canary for one in bundle.measured if one.canary is not None]:
        _require_canary(canary, bundle.monitor, architecture)
    check = bundle.header_check
    if check is not None:
        _require_sites(check.probe.sites, architecture)
        _number("first_threshold", check.first_threshold, -_FLOAT32_MAX, _FLOAT32_MAX)
        _whole("every_tokens", check.every_tokens, 1, _MOST_STEPS)
        _whole("max_looks", check.max_looks, 1, _MOST_STEPS)
        _require_certificates(check.certificates, _Range(-_FLOAT32_MAX), context)
        _require_covering(check.certificates, bundle.certificates)
    if bundle.reasoning is not None:
        further = bundle.reasoning.certificates
        _require_certificates(further, _Range(-_FLOAT32_MAX), context)
        _require_covering(further, bundle.certificates)


def require_plausible_rules(
    monitor: MonitorConfig,
    certificates: Sequence[Certificate],
    *,
    context: int | None = None,
    has_sentinels: bool = False,
) -> None:
    """Check what a statistic is made of and compared with.

    Args:
        monitor: Logits to a statistic.
        certificates: Of the statistic.
        context: Positions of the model, where they are known.
        has_sentinels: A response without a score of its phase has the smallest number of all.

    Raises:
        ConfigurationError, CertificateError: A number is impossible; it is named.
    """
    for name in ("start", "offset"):
        for value in getattr(monitor, name):
            _number(name, value, -_FLOAT32_MAX, _FLOAT32_MAX)
    for value in monitor.scale:
        _number("scale", value, _FLOAT32_TINY, _FLOAT32_MAX)
    _number("smoothing", monitor.smoothing, _FLOAT32_TINY, 1.0)
    _number("low_mark", monitor.low_mark, -_FLOAT32_MAX, _FLOAT32_MAX)
    _number("drift", monitor.drift, 0.0, _FLOAT32_MAX)
    _whole("window", monitor.window, 1, _MOST_STEPS)
    _whole("hits", monitor.hits, 1, _MOST_STEPS)
    _whole("best", monitor.best, 1, _MOST_WINDOWS)
    for place, height in zip(monitor.boundary_at, monitor.boundary, strict=True):
        _whole("boundary_at", place, 0, _MOST_STEPS)
        _number("boundary", height, -_FLOAT32_MAX, _FLOAT32_MAX)
    smallest = -_FLOAT32_MAX
    if monitor.kind == "cusum" and not has_sentinels and not monitor.boundary:
        # A sum starts at 0 and never falls below; the slack is for float32's rounding.
        smallest = monitor.first_value - 1e-4 * (1.0 + abs(monitor.first_value))
    _require_certificates(certificates, _Range(smallest), context)


class _Range(NamedTuple):
    low: float
    high: float = _FLOAT32_MAX


def _require_certificates(
    certificates: Sequence[Certificate], values: _Range, context: int | None
) -> None:
    for one in certificates:
        where = f" of the certificate for {one.population!r}"
        _number("alpha", one.alpha, 0.0, MOST_ALPHA, where, above_low=True)
        _number("delta", one.delta, 0.0, MOST_DELTA, where, above_low=True)
        _whole("n", one.n, 1, None, where)
        _whole("j", one.j, 0, one.n, where)
        _require_envelope(one, context, where)
        for maximum in (min(one.maxima), max(one.maxima)):
            _number("maxima", maximum, values.low, values.high, where)
        if not one.population.strip() or len(one.population) > _MOST_TEXT:
            raise CertificateError(f"population={one.population[:40]!r} is no name; {_REMEDY}")
        if context is not None and max(one.evidence.reaches, default=0) > context:
            raise CertificateError(
                f"reaches{where} hold {max(one.evidence.reaches)} tokens, but the model has "
                f"{context} positions; {_REMEDY}"
            )
    _require_order(certificates)


def _require_envelope(certificate: Certificate, context: int | None, where: str) -> None:
    envelope = certificate.envelope
    _whole("max_new_tokens", envelope.max_new_tokens, 1, context, where)
    if not isinstance(envelope.do_sample, bool):
        raise CertificateError(f"do_sample={envelope.do_sample!r}{where} is not true or false.")
    # Greedy rows may say 0: the temperature has no meaning there.
    _number(
        "temperature",
        envelope.temperature,
        0.0,
        _MOST_TEMPERATURE,
        where,
        above_low=envelope.do_sample,
    )
    _number("top_p", envelope.top_p, 0.0, 1.0, where, above_low=True)
    _whole("top_k", envelope.top_k, 0, _MOST_IDS, where)


def _require_covering(parts: Sequence[Certificate], mains: Sequence[Certificate]) -> None:
    """Refuse a further threshold that is certified up to less than the one beside it."""
    for part in parts:
        for main in mains:
            cap, needed = part.envelope.max_new_tokens, main.envelope.max_new_tokens
            alike = (main.population, main.dtype) == (part.population, part.dtype)
            alike = alike and math.isclose(main.alpha, part.alpha)
            if alike and cap < needed:
                raise CertificateError(
                    f"max_new_tokens={cap} of a further certificate for {part.population!r} at "
                    f"alpha={part.alpha:g} is below {needed}, that of the statistic; certify both "
                    "up to the same cap."
                )


def _require_order(certificates: Sequence[Certificate]) -> None:
    """Refuse a level twice, and a stricter level with a lower threshold on the same maxima."""
    ordered = sorted(certificates, key=lambda one: (*_draw(one), one.alpha))
    for first, second in zip(ordered, ordered[1:], strict=False):
        if _draw(first) != _draw(second):
            continue
        if math.isclose(first.alpha, second.alpha):
            raise CertificateError(
                f"alpha={first.alpha:g} is certified twice for {first.population!r}; {_REMEDY}"
            )
        if first.threshold < second.threshold:
            raise CertificateError(
                f"threshold={second.threshold:g} for {first.population!r} at "
                f"alpha={second.alpha:g} lies above {first.threshold:g} at alpha={first.alpha:g}, "
                f"wanted at most that, from the same maxima; {_REMEDY}"
            )


def _draw(one: Certificate) -> tuple[str, str, int, tuple[float, ...]]:
    return one.population, one.dtype or "", one.envelope.max_new_tokens, one.maxima


def _require_canary(
    canary: CanaryRecord, monitor: MonitorConfig, architecture: Mapping[str, str]
) -> None:
    # What differs by a whole benign standard deviation is another reading.
    _number(
        "tolerance",
        canary.tolerance,
        0.0,
        max(*monitor.scale, _LEAST_CANARY_TOLERANCE),
        above_low=True,
    )
    _whole("turn_start", canary.turn_start, 1, len(canary.ids), " of the canary")
    vocab = _entry(architecture, "vocab_size")
    for token in canary.ids:
        # Added tokens may lie behind the vocabulary that the configuration counts.
        _whole("ids", token, 0, _MOST_IDS if vocab is None else 2 * vocab, " of the canary")


def _require_sites(sites: Sequence[Site], architecture: Mapping[str, str]) -> None:
    layers = _entry(architecture, "num_hidden_layers")
    for site in sites:
        _whole("layer", site.layer, 0, _MOST_STEPS if layers is None else layers - 1, " of a site")
        for channel in (site.channels[0], site.channels[-1]):
            _whole("channels", channel, 0, _MOST_CHANNELS, " of a site")
        width = _entry(architecture, "hidden_size")
        if site.kind == "resid" and width is not None:
            _whole("channels", site.channels[-1], 0, width - 1, " of a site")


def _context(architecture: Mapping[str, str]) -> int | None:
    return _entry(architecture, "max_position_embeddings")


def _entry(architecture: Mapping[str, str], name: str) -> int | None:
    """Return a size of the fingerprint; None where this model's configuration has none."""
    if name not in architecture:
        return None
    value: Any = json.loads(architecture[name])
    _whole(name, value, 1, _MOST_IDS, " of the fingerprint")
    return int(value)


def _whole(name: str, value: object, low: int, high: int | None, where: str = "") -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not good or (high is not None and isinstance(value, int) and value > high):
        wanted = f"at least {low}" if high is None else f"{low} to {high}"
        raise ConfigurationError(
            f"{name}={_short(value)}{where} is impossible, wanted a whole number, {wanted}; "
            f"{_REMEDY}"
        )


def _number(
    name: str, value: object, low: float, high: float, where: str = "", *, above_low: bool = False
) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if good and isinstance(value, int | float):
        good = low <= value <= high and not (above_low and value == low)
    if not good:
        edge = "above" if above_low else "from"
        raise ConfigurationError(
            f"{name}={_short(value)}{where} is impossible, wanted a number {edge} {low:g} to "
            f"{high:g}; {_REMEDY}"
        )


def _short(value: object) -> str:
    return repr(value)[:60]
