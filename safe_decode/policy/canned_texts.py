"""Canned text as ids, encoded once for all rows that may need it.

Knows texts and a tokenizer. Does not know models, rows or what has tripped.
"""

from __future__ import annotations

from safe_decode.errors import ConfigurationError
from safe_decode.policy.redirect import CannedTexts
from safe_decode.prompts import chat
from safe_decode.typing import Tokenizer

__all__ = ["texts_of"]

_CUT = " ... "


def texts_of(tokenizer: Tokenizer, refusal: str, opener: str) -> CannedTexts:
    """Encode canned text.

    Raises:
        ConfigurationError: One of them is empty.
    """
    for name, text in (("refusal", refusal), ("opener", opener)):
        if not text.strip():
            raise ConfigurationError(f"{name}={text!r} is empty; pass a text that readers get.")
    # Canned text may follow a cut in the middle of a sentence: readers see that there is one.
    return CannedTexts(
        refusal=chat.text_ids(tokenizer, refusal),
        refusal_after=chat.text_ids(tokenizer, _CUT + refusal),
        opener=chat.text_ids(tokenizer, opener),
        opener_after=chat.text_ids(tokenizer, _CUT + opener),
    )
