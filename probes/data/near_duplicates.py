"""Near duplicates share a group, so that no split holds what another was fitted on.

Two rows are neighbours if their prompts, or their responses, share more than half of the
8-grams of the shorter one. Phrases that stand in many groups (a jailbreak template, a
formula of courtesy) say nothing of kinship and are left out, and refusals are not compared
with one another: a model refuses everything in the same words. Neighbours of neighbours are
one group.

Knows words and groups. Does not know labels' meaning, models or splits.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from probes.data.conversations import Conversation
from probes.data.refusal_rule import refuses
from safe_decode.errors import ConfigurationError

__all__ = ["Merged", "merge_near_duplicates", "word_grams"]

_NOTHING: NDArray[np.uint64] = np.empty(0, np.uint64)

_WORD = re.compile(r"\w+")
_CACHED_WORDS = 2**18
# Odd, so that no word of a run is lost to the wrap-around of 64 bits.
_MULTIPLIER = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Merged:
    """Conversations whose groups hold their near duplicates.

    Attributes:
        conversations: In the order given, `group` replaced by the merged one's name: the
            alphabetically first of its members.
        groups_before: How many groups there were.
        groups: How many there are.
        largest: Rows of the largest group.
        boilerplate: 8-grams left out because they stand in too many groups.
    """

    conversations: list[Conversation]
    groups_before: int
    groups: int
    largest: int
    boilerplate: int

    def to_json(self) -> dict[str, int]:
        """Return the counts."""
        names = ("groups_before", "groups", "largest", "boilerplate")
        return {name: getattr(self, name) for name in names}


def merge_near_duplicates(
    conversations: Iterable[Conversation],
    *,
    size: int = 8,
    share: float = 0.5,
    most_groups: int = 20,
) -> Merged:
    """Merge the groups of near duplicates.

    Args:
        conversations: With the groups they have.
        size: Words of a gram.
        share: Of the grams of the shorter text; above it two texts are near duplicates.
        most_groups: A gram that stands in more groups is boilerplate.

    Raises:
        ConfigurationError: A number is out of range.
    """
    if size < 1 or most_groups < 1 or not 0.0 <= share < 1.0:
        raise ConfigurationError(
            f"size={size} and most_groups={most_groups} must be at least 1, share={share} in "
            "[0, 1)."
        )
    rows = list(conversations)
    names = sorted({row.group for row in rows})
    forest = _Forest(len(names))
    number = {name: index for index, name in enumerate(names)}
    groups = [number[row.group] for row in rows]
    prompts = [word_grams(_asked(row), size, whole=True) for row in rows]
    answers = [_NOTHING if refuses(row) else word_grams(row.response, size) for row in rows]
    boilerplate = sum(
        _join(texts, groups, forest, share=share, most_groups=most_groups)
        for texts in (prompts, answers)
    )
    merged = [
        replace(row, group=names[forest.root(group)])
        for row, group in zip(rows, groups, strict=True)
    ]
    sizes = Counter(row.group for row in merged)
    largest = max(sizes.values(), default=0)
    return Merged(merged, len(names), len(sizes), largest, boilerplate)


def word_grams(text: str, size: int, *, whole: bool = False) -> NDArray[np.uint64]:
    """Digest every distinct run of `size` words; case and punctuation do not count.

    Args:
        text: Any.
        size: Words of a run.
        whole: Take a text of fewer words as one gram, rather than as none.

    Returns:
        [n] uint64, ascending.
    """
    words = np.asarray([_digest(word) for word in _WORD.findall(text.casefold())], np.uint64)
    if len(words) < size:
        if not whole or not len(words):
            return _NOTHING
        size = len(words)
    runs = np.lib.stride_tricks.sliding_window_view(words, size)
    powers = [pow(_MULTIPLIER, place, 2**64) for place in range(size)]
    return np.unique((runs * np.asarray(powers, np.uint64)).sum(axis=1, dtype=np.uint64))


class _Forest:
    """Disjoint sets; the root of each is its smallest member."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, member: int) -> int:
        while self._parent[member] != member:
            self._parent[member] = self._parent[self._parent[member]]
            member = self._parent[member]
        return member

    def join(self, first: int, second: int) -> None:
        low, high = sorted((self.root(first), self.root(second)))
        self._parent[high] = low


def _join(
    texts: Sequence[NDArray[np.uint64]],
    groups: Sequence[int],
    forest: _Forest,
    *,
    share: float,
    most_groups: int,
) -> int:
    """Join the groups of near duplicates and count what was left out as boilerplate."""
    rows = np.repeat(np.arange(len(texts)), [len(grams) for grams in texts])
    if not len(rows):
        return 0
    grams = np.concatenate(texts)
    group = np.asarray(groups)[rows]
    order = np.lexsort((group, grams))
    rows, grams, group = rows[order], grams[order], group[order]
    is_new = np.r_[True, grams[1:] != grams[:-1]]
    is_new_group = is_new | np.r_[True, group[1:] != group[:-1]]
    run = np.cumsum(is_new) - 1
    holders = np.bincount(run, weights=is_new_group)
    common = holders > most_groups
    rare = np.bincount(rows[~common[run]], minlength=len(texts))
    shared: Counter[tuple[int, int]] = Counter()
    # Only what stands in several groups can join any.
    joins = ((holders > 1) & ~common)[run]
    begins = np.flatnonzero(np.r_[True, run[joins][1:] != run[joins][:-1]])[1:]
    for members in np.split(rows[joins], begins):
        shared.update(combinations(sorted(members.tolist()), 2))
    for (first, second), count in shared.items():
        if count > share * min(rare[first], rare[second]):
            forest.join(groups[first], groups[second])
    return int(common.sum())


def _asked(row: Conversation) -> str:
    return "\n".join(message["content"] for message in row.messages if message["role"] == "user")


@lru_cache(_CACHED_WORDS)
def _digest(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
