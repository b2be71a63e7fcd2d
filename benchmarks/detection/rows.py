"""Rows of the detection tables: a share beside its bound and target, or a figure alone.

"At most" and "at least" pass on the share's one-sided 95 % bound.

Knows the columns. Does not know what is measured.
"""

from __future__ import annotations

from typing import Any

from probes.metrics.detection import Proportion

__all__ = ["figure_row", "share_row"]


def share_row(  # noqa: PLR0913
    what: str,
    n: int,
    bare: float | None,
    share: Proportion,
    target: str,
    *,
    at_most: bool,
    broken: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Set a share beside the bare one, and say whether its bound meets the target."""
    limit = float(target.split()[-2]) / 100
    bound = share.upper_bound if at_most else share.lower_bound
    return {
        "what": what,
        "n": n,
        "bare %": None if bare is None else round(100 * bare, 2),
        "guarded %": round(100 * share.point, 2),
        "of which broken, bare and guarded %": _percents(broken),
        "95 % interval": [round(100 * share.low, 2), round(100 * share.high, 2)],
        "one-sided bound %": round(100 * bound, 2),
        "target": target,
        "met": "yes" if (bound <= limit if at_most else bound >= limit) else "no",
    }


def figure_row(
    what: str,
    n: int,
    *,
    bare: float | None = None,
    guarded: float | None = None,
    values: list[float] | None = None,
    target: str = "none",
    met: str = "–",
) -> dict[str, Any]:
    """Write a figure that has no bound; shares are taken in 0..1."""
    return {
        "what": what,
        "n": n,
        "bare %": None if bare is None else round(100 * bare, 2),
        "guarded %": None if guarded is None else round(100 * guarded, 2),
        "of which broken, bare and guarded %": None,
        "95 % interval": values,
        "one-sided bound %": None,
        "target": target,
        "met": met,
    }


def _percents(shares: tuple[float, float] | None) -> list[float] | None:
    return None if shares is None else [round(100 * share, 2) for share in shares]
