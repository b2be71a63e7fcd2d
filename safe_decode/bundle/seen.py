"""Which prompts a bundle was made from, so that nobody reports figures on them unawares.

Digests of the users' words, not the words: case, punctuation and spaces do not count. Somebody
who has a prompt can ask whether it was used; nobody can read the prompts from a bundle.

Knows digests and the splits they stood in. Does not know conversations or what a split is for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from safe_decode.errors import BundleCorruptError

__all__ = ["SeenPrompts", "prompt_digest"]

_WORD = re.compile(r"\w+")
_BYTES = 8


def prompt_digest(text: str) -> int:
    """Digest the words of a prompt to a signed integer of 64 bits."""
    words = " ".join(_WORD.findall(text.casefold()))
    digest = hashlib.blake2b(words.encode(), digest_size=_BYTES).digest()
    return int.from_bytes(digest, "big", signed=True)


@dataclass(frozen=True)
class SeenPrompts:
    """The prompts of each split, as digests.

    Attributes:
        splits: Names of the splits.
        digests: [n] ascending, each once.
        places: [n] index into `splits` of each digest.

    Raises:
        BundleCorruptError: Digests that are not ascending, or places that name no split.
    """

    splits: tuple[str, ...] = ()
    digests: tuple[int, ...] = field(default=(), repr=False)
    places: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.digests, self.digests[1:], strict=False))
        if not ascending or len(self.digests) != len(self.places):
            raise BundleCorruptError(
                f"{len(self.digests)} digests of prompts, with {len(self.places)} splits, are not "
                "ascending or not one each; fetch the bundle again."
            )
        if any(not 0 <= place < len(self.splits) for place in self.places):
            raise BundleCorruptError(
                f"a prompt stands in none of the splits {self.splits}; fetch the bundle again."
            )

    @classmethod
    def of(cls, prompts: Iterable[tuple[str, str]]) -> SeenPrompts:
        """Record prompts, each with its split; of a prompt in two splits the last counts."""
        found = {prompt_digest(text): split for text, split in prompts}
        splits = tuple(sorted(set(found.values())))
        digests = tuple(sorted(found))
        return cls(splits, digests, tuple(splits.index(found[digest]) for digest in digests))

    def __len__(self) -> int:
        return len(self.digests)

    def split_of(self, text: str) -> str | None:
        """Return the split in which a prompt stood; None: the bundle was not made from it."""
        return self._by_digest.get(prompt_digest(text))

    @cached_property
    def _by_digest(self) -> Mapping[int, str]:
        pairs = zip(self.digests, self.places, strict=True)
        return {digest: self.splits[place] for digest, place in pairs}
