"""A bundle as a notebook shows it: a small table that takes its colours from the page around it.

Knows markup, and escapes every text. Does not know what a bundle says.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

__all__ = ["rows_as_html"]

_CELL = "text-align:left;vertical-align:top;padding:2px 12px 2px 0;background:none;border:0"


def rows_as_html(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Draw names and texts as a table; warnings stand out by a bar, not by colour alone."""
    drawn = "".join(
        f'<tr><th scope="row" style="{_CELL};font-weight:600;{_bar(name)}">{escape(name)}</th>'
        f'<td style="{_CELL}">{escape(text)}</td></tr>'
        for name, text in rows
    )
    return (
        f'<div style="font-size:13px;line-height:1.5"><strong>{escape(title)}</strong>'
        f'<table style="border-collapse:collapse;color:inherit">{drawn}</table></div>'
    )


def _bar(name: str) -> str:
    return "border-left:4px solid #d9534f;padding-left:8px" if name == "warning" else ""
