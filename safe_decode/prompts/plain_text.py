"""Text from outside as token ids: ordinary characters, whatever control token it spells.

Knows a tokenizer's added tokens and how a text is kept from becoming one. Does not know roles,
templates or turns.

A tokenizer keeps the way it treats control tokens between calls, so it encodes for one thread at
a time (`encoding`). What is asked of it once for a text is not asked again for each id.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from safe_decode.errors import PromptError
from safe_decode.typing import Tokenizer

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Controls", "controls_of", "encoding", "text_ids"]

encoding = threading.RLock()
"""Held while a tokenizer encodes: two threads that want different treatments would swap them."""


class Controls(NamedTuple):
    """The control tokens of a tokenizer as it is now.

    Attributes:
        ids: Their ids.
        spellings: Their texts.
    """

    ids: frozenset[int]
    spellings: tuple[str, ...]

    def spelt_in(self, texts: Sequence[str]) -> list[list[str]]:
        """Return what each text spells, in order; in time linear in their lengths."""
        if not self.spellings:
            return [[] for _ in texts]
        found = _finder(self.spellings).encode_batch(list(texts))
        return [[self.spellings[i - 1] for i in one.ids if i] for one in found]


def controls_of(tokenizer: Tokenizer) -> Controls:
    """Read a tokenizer's control tokens; those added later are seen by the next call."""
    told = {
        int(i): str(token)
        for i, token in tokenizer.added_tokens_decoder.items()
        if str(token).strip()  # white space is ordinary text, also where it is an added token
    }
    return Controls(frozenset(told), tuple(dict.fromkeys(told.values())))


def text_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Encode text that continues a turn: no BOS, and no control token whatever it spells.

    Raises:
        PromptError: The tokenizer makes a control token of it all the same.
    """
    with encoding:
        ids = _plain_ids(tokenizer, "\n" + text)
        newline = _plain_ids(tokenizer, "\n")
        # SentencePiece puts a space before a text's first word. Behind a newline it does not,
        # unless the newline merges with the text.
        begins_so = ids[: len(newline)] == newline
        ids = ids[len(newline) :] if begins_so else _plain_ids(tokenizer, text)
    controls = controls_of(tokenizer).ids
    added = next((i for i in ids if i in controls), None)
    if added is not None:
        raise PromptError(
            f"the text spells the control token {tokenizer.convert_ids_to_tokens(added)!r}, "
            "which this tokenizer cannot encode as ordinary text; remove it."
        )
    return tuple(ids)


def _plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(
        text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
    )
    return [int(i) for i in ids]


@lru_cache(maxsize=8)
def _finder(spellings: tuple[str, ...]) -> tokenizers.Tokenizer:
    """Build a tokenizer whose added tokens are these and whose other text is the one id 0.

    The library finds all of them in one pass (Aho-Corasick), without Python's lock; a regular
    expression of as many alternatives tries each of them at each place, and holds it.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel

    rest = "?" * (1 + max(map(len, spellings)))
    finder = Tokenizer(WordLevel({rest: 0}, unk_token=rest))
    finder.add_tokens([AddedToken(text, normalized=False) for text in spellings])
    return finder
