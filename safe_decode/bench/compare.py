"""What got slower: one run beside an older one.

Knows rows of results. Does not know clocks. Ratios to the bare model are compared, not times,
since the machine may be another or busier; a change counts when the intervals do not touch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from safe_decode.errors import ConfigurationError

__all__ = ["Change", "SpeedVerdict", "compare"]

SpeedVerdict = Literal["slower", "faster", "same"]

_KEYS = (
    "subject", "dtype", "device", "mode", "features", "heads", "sites", "batch", "context",
    "new_tokens", "vocab", "arm",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One arm, then and now.

    Attributes:
        what: Which arm of which measurement.
        old: Its ratio to bare then.
        new: Its ratio to bare now.
        verdict: Whether that is beyond noise.
    """

    what: str
    old: float
    new: float
    verdict: SpeedVerdict


def compare(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Change]:
    """Compare what both runs measured.

    Raises:
        ConfigurationError: They have no measurement in common.
    """
    before = {_key(row): row for row in old if "ratio_95" in row}
    changes = [
        _change(before[_key(row)], row)
        for row in new
        if "ratio_95" in row and row["arm"] != "bare" and _key(row) in before
    ]
    if not changes:
        raise ConfigurationError(
            "the older run measured nothing that this one does; pass a file of the same subject, "
            "batch, context and probe."
        )
    return changes


def _change(old: Mapping[str, Any], new: Mapping[str, Any]) -> Change:
    verdict: SpeedVerdict = "same"
    if new["ratio_95"][0] > old["ratio_95"][1]:
        verdict = "slower"
    elif new["ratio_95"][1] < old["ratio_95"][0]:
        verdict = "faster"
    mode = new.get("mode", "eager")
    what = f"{new['arm']}, {new['subject']}, {mode}, batch {new['batch']}, context {new['context']}"
    return Change(what, float(old["ratio"]), float(new["ratio"]), verdict)


def _key(row: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(row.get(name) for name in _KEYS)
