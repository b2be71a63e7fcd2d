"""Traces as a notebook shows them: tokens on the ground of their risk, and where the guard tripped.

The markup is small, asks for nothing from outside, and takes the colour of its letters from the
page around it: grounds are thin tints, which are read on a light page and on a dark one. Colour
never stands alone: the trip, what was taken back and what was given carry signs too.

Knows markup, and escapes every text. Does not know models or tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from safe_decode.trace.risk import BANDS, band_of
from safe_decode.trace.schema import SafetyTrace
from safe_decode.trace.shown import Decode, Mark, ShownToken, shown_tokens, visible

__all__ = ["trace_as_html"]

_MOST_TOKENS = 2000
"""Tokens that are drawn of one row; a longer one says how many are left out."""
_TAGS: dict[Mark, tuple[str, str]] = {
    "prefill": ("<em>«", "»</em>"),
    "plain": ("", ""),
    "dropped": ('<del style="opacity:.75">', "</del>"),
    "trip": ("<del>", "</del>"),
    "redirect": ("<b>›</b> <ins>", "</ins>"),
}
_FLAG = (
    '<b style="border:1px solid currentColor;border-radius:3px;padding:0 4px;margin:0 2px">'
    "▲ trips</b>"
)


def trace_as_html(
    trace: SafetyTrace, *, decode: Decode | None = None, text: str | None = None
) -> str:
    """Draw one row.

    Args:
        trace: Of the row.
        decode: The tokenizer's; None: tokens are shown as their ids.
        text: What the reader gets; None: it is not shown.
    """
    if any(step.token is None and step.position > 0 for step in trace.steps):
        decode = None  # read from a file without ids, or embeddings
    tokens = shown_tokens(trace, decode)
    more = len(tokens) - _MOST_TOKENS
    rest = f"<p>… and {more:,} tokens more</p>" if more > 0 else ""
    gets = "" if text is None else f"<p><b>The reader gets:</b> {escape(visible(text))}</p>"
    told = escape(visible("; ".join(trace.header.warnings)))
    warned = f"<p><b>Beware:</b> {told}</p>" if told else ""
    return (
        '<div style="font-size:13px;line-height:1.7;margin:4px 0;white-space:pre-wrap;'
        'overflow-wrap:anywhere">'
        f"<p><b>{escape(trace.summary)}</b></p>"
        f"<p>{''.join(_runs(tokens[:_MOST_TOKENS]))}</p>{rest}{gets}{warned}</div>"
    )


def _runs(tokens: Sequence[ShownToken]) -> Iterator[str]:
    for mark, run in groupby(tokens, key=lambda token: token.mark):
        opens, closes = _TAGS[mark]
        yield opens + "".join(map(_token, run)) + closes + (_FLAG if mark == "trip" else "")


def _token(token: ShownToken) -> str:
    text = escape(visible(token.text))
    if token.risk is None:
        return text
    if not band_of(token.risk):
        return f'<span title="risk {token.risk:.2f}">{text}</span>'
    tint = f"background:rgba(226,88,62,{0.55 * band_of(token.risk) / (BANDS - 1):.2f})"
    return f'<span style="{tint}" title="risk {token.risk:.2f}">{text}</span>'
