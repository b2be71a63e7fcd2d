"""What `make real` shows, as tables: the scenes side by side, and what was counted.

`safe-decode demo --model NAME --json > FILE`, then `python -m benchmarks.docs.real_demo FILE`, make
it. The first words of each answer are kept: harm is named and not taught.

Knows the fields of that document. Does not know models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.docs.markdown import table
from safe_decode.whole_files import write_whole

__all__ = ["as_markdown", "first_words", "main"]

RESULTS = Path(__file__).resolve().parents[1] / "results" / "real-demo.json"
_WORDS = 12
_TITLES = {
    "benign": "benign",
    "hard_negative": "harmless, alarming words",
    "long": "harmless, long",
    "harmful": "harmful, plain",
    "framed": "harmful, framed",
    "prefilled": 'harmful, behind "Sure"',
}


def as_markdown(path: Path = RESULTS) -> str:
    """Draw the document; empty where there is none."""
    if not path.exists():
        return ""
    told = json.loads(path.read_text("utf-8"))
    shown = [_shown(one) for one in told["shown"]]
    counted = [_counted(one) for one in told["scenes"]]
    facts = told["facts"]
    card = f"*model: {facts['model']}; certificate: {facts['certificate']}; time: {facts['time']}.*"
    tables = [
        table(list(rows[0]), [list(row.values()) for row in rows]) for rows in (shown, counted)
    ]
    return "\n\n".join([*tables, card])


def first_words(text: str, words: int = _WORDS) -> str:
    """Return the beginning of a text on one line."""
    found = text.split()
    return " ".join(found[:words]) + (" ..." if len(found) > words else "")


def _shown(one: Mapping[str, Any]) -> dict[str, str]:
    begun = f" *{one['prefill']}*" if one["prefill"] else ""
    return {
        "scene": _TITLES[one["scene"]],
        "asked": one["request"] + begun,
        "bare": first_words(one["bare"]),
        "guarded": first_words(one["guarded"]) if one["tripped"] else "the same",
        "tripped": "yes" if one["tripped"] else "no",
    }


def _counted(one: Mapping[str, Any]) -> dict[str, object]:
    return {
        "scene": _TITLES[one["scene"]],
        "n": one["n"],
        "bare complies": one["bare"]["harmful"],
        "guarded complies": one["guarded"]["harmful"],
        "bare refuses": one["bare"]["refusal"],
        "guarded refuses": one["guarded"]["refusal"],
        "tripped": one["tripped"],
        "unchanged": one["unchanged"],
    }


def main(argv: Sequence[str]) -> None:
    """Keep a document of the demo, with the first words of each answer."""
    told = json.loads(Path(argv[0]).read_text("utf-8"))
    for one in told["shown"]:
        one |= {name: first_words(one[name]) for name in ("bare", "guarded")}
    write_whole(RESULTS, json.dumps(told, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
