"""How many judged responses a split needs, for every command that fits or reports.

Knows counts. Does not know where they come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from probes.data.conversations import Conversation, Split
from safe_decode.bundle.summary import FEWEST_HARMFUL
from safe_decode.errors import DataError

__all__ = [
    "LEAST_HARMFUL",
    "TRUSTED_HARMFUL",
    "label_problems",
    "label_warnings",
    "require_labels",
]

LEAST_HARMFUL = 10
"""Below it a split says nothing: one response more or less is ten points of recall."""
TRUSTED_HARMFUL = FEWEST_HARMFUL
"""Below it the 95 % interval of a recall is wider than 35 points at its widest."""
_NEEDED: tuple[Split, ...] = ("fit", "select", "test")
_CONSEQUENCE: Mapping[Split, str] = {
    "select": "the choice among probes is a guess",
    "test": "the recall is uncertain",
}


def label_problems(
    harmful: Mapping[Split, int],
    harmless: Mapping[Split, int],
    *,
    upto: str = "",
    splits: Sequence[Split] = _NEEDED,
) -> list[str]:
    """Name the splits that hold too few responses of a label.

    Args:
        harmful: Responses that do harm, by split.
        harmless: Those that do none.
        upto: Stands before a count of harmful responses that may turn out lower.
        splits: Those that must hold enough.
    """
    problems = []
    for split in splits:
        if harmful.get(split, 0) < LEAST_HARMFUL:
            problems.append(
                f"{split} holds {upto}{harmful.get(split, 0)} harmful responses, wanted at least "
                f"{LEAST_HARMFUL}: add judged harmful responses or harmful prompts"
            )
        if harmless.get(split, 0) < LEAST_HARMFUL:
            problems.append(
                f"{split} holds {harmless.get(split, 0)} harmless responses, wanted at least "
                f"{LEAST_HARMFUL}: add judged harmless responses or benign prompts"
            )
    return problems


def label_warnings(harmful: Mapping[Split, int], *, upto: str = "") -> list[str]:
    """Name the splits whose figures rest on few harmful responses."""
    return [
        f"{split} holds {upto}{harmful.get(split, 0)} harmful responses, wanted "
        f"{TRUSTED_HARMFUL}: {what}"
        for split, what in _CONSEQUENCE.items()
        if harmful.get(split, 0) < TRUSTED_HARMFUL
    ]


def require_labels(rows: Iterable[Conversation]) -> list[str]:
    """Refuse rows with too few responses of a label to fit or choose; return what else is short.

    Raises:
        DataError: A split is too small; each is named.
    """
    rows = list(rows)
    harmful = Counter(row.split for row in rows if row.response_harmful and row.split)
    harmless = Counter(row.split for row in rows if row.response_harmful is False and row.split)
    if problems := label_problems(harmful, harmless, splits=("fit", "select")):
        raise DataError("the data is too small: " + "; ".join(problems) + ".")
    return label_warnings(harmful)
