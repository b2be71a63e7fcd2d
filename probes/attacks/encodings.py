"""Encodings an attacker can ask in and read back, each with its inverse.

Knows letters. Does not know prompts or models.
"""

from __future__ import annotations

import base64
import binascii
import codecs
from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["ENCODINGS", "Encoding"]


class Encoding(NamedTuple):
    """A way to write text.

    Attributes:
        about: What a prompt says of it.
        encode: Text to its encoded form.
        decode: Back; text that is not so encoded comes out as nonsense, never as an error.
    """

    about: str
    encode: Callable[[str], str]
    decode: Callable[[str], str]


def _from_base64(text: str) -> str:
    letters = "".join(text.split())
    try:
        # An answer may stop in the middle of a group of four.
        return base64.b64decode(letters[: len(letters) // 4 * 4]).decode("utf-8", "replace")
    except (binascii.Error, ValueError):
        return ""


def _swapped_case(text: str) -> str:
    return text.swapcase()


def _rotated(text: str) -> str:
    return codecs.encode(text, "rot13")


def _reversed_words(text: str) -> str:
    return " ".join(word[::-1] for word in text.split(" "))


def _spaced(text: str) -> str:
    return " ".join(text.replace(" ", "_"))


def _unspaced(text: str) -> str:
    return text.replace(" ", "").replace("_", " ")


ENCODINGS: Mapping[str, Encoding] = {
    "base64": Encoding(
        "base64", lambda text: base64.b64encode(text.encode()).decode(), _from_base64
    ),
    "rot13": Encoding("rot13", _rotated, _rotated),
    "reversed words": Encoding("words spelt from back to front", _reversed_words, _reversed_words),
    "spaced letters": Encoding("letters with spaces between them", _spaced, _unspaced),
    "swapped case": Encoding("capitals and small letters swapped", _swapped_case, _swapped_case),
}
