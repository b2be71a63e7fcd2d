"""Rows that a bundle was made from are not rows that it can be judged by.

A bundle records digests of the prompts it has seen, by split. Rows of prompts it was fitted or
calibrated on serve the controls for the same purpose; rows it was located or chosen on serve
nothing; only the others are reported on.

Knows conversations, splits and what a bundle records. Does not know models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from probes.data.conversations import Conversation, by_split
from safe_decode.bundle.seen import SeenPrompts
from safe_decode.errors import DataError

__all__ = ["EvaluationRows", "rows_for_evaluation"]

_OPEN = (None, "test")
"""What the bundle says of a prompt that figures may be of."""


@dataclass(frozen=True)
class EvaluationRows:
    """What is fitted on, calibrated on and reported on.

    Attributes:
        fit: For controls.
        calibrate: For thresholds of controls.
        test: For all figures.
        left_out: Rows that would have been reported on, by the split in which the bundle saw
            their prompt.
        note: What a reader should know, or None.
    """

    fit: tuple[Conversation, ...]
    calibrate: tuple[Conversation, ...]
    test: tuple[Conversation, ...]
    left_out: Mapping[str, int]
    note: str | None

    def parts(self) -> dict[str, list[Conversation]]:
        """Return the rows by split."""
        return {
            "fit": list(self.fit),
            "calibrate": list(self.calibrate),
            "test": list(self.test),
        }


def rows_for_evaluation(
    rows: Sequence[Conversation],
    seen: SeenPrompts | None,
    *,
    train: Sequence[Conversation] = (),
    name: str = "data",
) -> EvaluationRows:
    """Sort rows by what they may be used for.

    Args:
        rows: All with a split, or all without.
        seen: What the bundle was made from; None: it does not say.
        train: What controls are fitted on instead, where rows have no splits.
        name: Of the rows, in messages.

    Raises:
        DataError: The bundle has seen every row that would be reported on.
    """
    known = seen or SeenPrompts()
    if any(row.split is not None for row in rows):
        parts = by_split(rows)
        fit, calibrate, test = parts["fit"], parts["calibrate"], parts["test"]
    else:
        fit = list(train) or [row for row in rows if known.split_of(row.prompt) == "fit"]
        calibrate = [row for row in rows if known.split_of(row.prompt) == "calibrate"]
        # Rows that serve the controls are not reported on, but are not missing either.
        test = [row for row in rows if known.split_of(row.prompt) not in ("fit", "calibrate")]
        if not test:
            test = list(rows)  # which is then refused
    homes = [known.split_of(row.prompt) for row in test]
    clean = [row for row, home in zip(test, homes, strict=True) if home in _OPEN]
    left_out = Counter(home for home in homes if home is not None and home != "test")
    if test and not clean:
        raise DataError(
            f"{name} holds {len(test)} rows to report on, and the bundle was made from the prompts "
            f"of all of them ({_told(left_out)}), wanted rows that it has not seen; pass others."
        )
    return EvaluationRows(
        tuple(fit), tuple(calibrate), tuple(clean), dict(left_out), _note(seen, left_out)
    )


def _note(seen: SeenPrompts | None, left_out: Mapping[str, int]) -> str | None:
    if seen is None:
        return (
            "the bundle does not record which prompts it was made from, so whether it has seen "
            "these rows cannot be said"
        )
    if not left_out:
        return None
    return (
        f"{sum(left_out.values()):,} rows are left out: the bundle was made from their prompts "
        f"({_told(left_out)})"
    )


def _told(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in sorted(left_out.items()))
