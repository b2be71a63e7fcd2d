"""The ways of fitting and the statistics that are tried where nobody names others.

Knows names and what is worth trying under each. Does not know data or figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from probes.fitting.linear import FitConfig, Method
from probes.fitting.selection import StatisticChoice
from safe_decode.errors import ConfigurationError

__all__ = ["STATISTICS", "WINDOWS", "fits_of", "statistics_of"]

WINDOWS = (1, 4, 8, 16)
"""Positions of the windowed loss."""

STATISTICS: Mapping[str, tuple[StatisticChoice, ...]] = {
    "ema": tuple(StatisticChoice("ema", window) for window in (1, 2, 4, 8, 16)),
    "mean": tuple(StatisticChoice("mean", window) for window in (4, 8, 16)),
    "cusum": tuple(StatisticChoice("cusum", drift=drift) for drift in (0.5, 1.0, 2.0)),
    "hysteresis": tuple(
        StatisticChoice("ema", window, hits=hits) for window, hits in ((1, 2), (1, 3), (4, 2))
    ),
}


def fits_of(methods: Sequence[str] | None, c: float) -> tuple[FitConfig, ...]:
    """Name the ways of fitting to try.

    Args:
        methods: See `linear.Method`; None for all.
        c: Of each.

    Raises:
        ConfigurationError: There is no such method.
    """
    known: dict[str, Method] = {name: name for name in get_args(Method)}
    _require("method", methods or (), tuple(known))
    found: list[FitConfig] = []
    for method in (known[name] for name in methods or known):
        windows = WINDOWS if method == "windowed" else (8,)
        found += [FitConfig(method=method, c=c, window=window) for window in windows]
    return tuple(found)


def statistics_of(names: Sequence[str] | None) -> tuple[StatisticChoice, ...]:
    """Name the statistics to try.

    Args:
        names: Keys of `STATISTICS`; None for all.

    Raises:
        ConfigurationError: There is no such statistic.
    """
    _require("statistic", names or (), tuple(STATISTICS))
    return tuple(choice for name in names or STATISTICS for choice in STATISTICS[name])


def _require(what: str, names: Sequence[str], known: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigurationError(f"{what}={unknown[0]!r} is not one of {known}; pass one of these.")
