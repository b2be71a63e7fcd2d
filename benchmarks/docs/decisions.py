"""The index of the decision records, by theme and status.

Each record says both in its front matter:

    ---
    theme: serving
    status: accepted
    ---

Knows themes and titles. Does not know what was decided. A record that names no theme is listed
last, so that none is ever left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from benchmarks.docs.markdown import table

__all__ = ["FOLDER", "THEMES", "Record", "as_markdown", "read_record"]

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "decisions"

THEMES: Mapping[str, str] = {
    "project": "How the project is built and tested",
    "generation": "Generation under the guard",
    "cost": "What the guard costs",
    "certificates": "Certificates, bundles and what they cover",
    "workbench": "From conversations to a bundle",
    "evaluation": "Evaluation and attacks",
    "location": "Located units and fine-tuning",
    "serving": "Serving",
    "embedded": "The embedded pair",
    "other": "Not yet sorted",
}
"""A theme's short name, and the heading of its part of the index."""

_FRONT = re.compile(r"\A---\n(?P<front>.*?)\n---\n", re.DOTALL)
_TITLE = re.compile(r"^# (?P<number>\d+)[.:]? (?P<title>.+)$", re.MULTILINE)


class Record(NamedTuple):
    """What the index says of one record."""

    number: str
    title: str
    file: str
    theme: str
    status: str


def read_record(path: Path) -> Record:
    """Read number, title, theme and status of a record.

    Raises:
        ValueError: The record has no title of the form `# NNN. Title`, or an unknown theme.
    """
    text = path.read_text(encoding="utf-8")
    front = _FRONT.match(text)
    facts = yaml.safe_load(front["front"]) if front else {}
    title = _TITLE.search(text)
    if title is None:
        raise ValueError(f"{path.name} has no line `# NNN. Title`; give it one.")
    theme = facts.get("theme", "other")
    if theme not in THEMES:
        raise ValueError(f"{path.name} has theme {theme!r}, wanted one of {', '.join(THEMES)}.")
    status = facts.get("status", "accepted")
    return Record(title["number"], title["title"], path.name, theme, status)


def as_markdown(folder: Path = FOLDER) -> str:
    """Draw one table a theme."""
    records = [read_record(path) for path in sorted(folder.glob("[0-9]*.md"))]
    parts = []
    for theme, heading in THEMES.items():
        rows = [
            [one.number, f"[{one.title}]({one.file})", one.status]
            for one in records
            if one.theme == theme
        ]
        if rows:
            parts += [f"## {heading}", table(("number", "decision", "status"), rows)]
    return "\n\n".join(parts)
