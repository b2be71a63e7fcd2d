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
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from probes.conversations import Conversation
from probes.refusals import refuses
from safe_decode.errors import ConfigurationError

__all__ = ["Merged", "merge_near_duplicates", "word_grams"]

_WORD = re.compile(r"\w+")


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
    answers = [frozenset[int]() if refuses(row) else word_grams(row.response, size) for row in rows]
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


def word_grams(text: str, size: int, *, whole: bool = False) -> frozenset[int]:
    """Digest every run of `size` words; case and punctuation do not count.

    Args:
        text: Any.
        size: Words of a run.
        whole: Take a text of fewer words as one gram, rather than as none.
    """
    words = _WORD.findall(text.casefold())
    if len(words) < size:
        return frozenset([_digest(words)] if whole and words else [])
    return frozenset(_digest(words[start : start + size]) for start in range(len(words) - size + 1))


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
    texts: Sequence[frozenset[int]],
    groups: Sequence[int],
    forest: _Forest,
    *,
    share: float,
    most_groups: int,
) -> int:
    """Join the groups of near duplicates and count what was left out as boilerplate."""
    holders: dict[int, set[int]] = defaultdict(set)
    for grams, group in zip(texts, groups, strict=True):
        for gram in grams:
            holders[gram].add(group)
    common = {gram for gram, found in holders.items() if len(found) > most_groups}
    rare = [grams - common for grams in texts]
    seen: dict[int, list[int]] = defaultdict(list)
    for row, grams in enumerate(rare):
        shared: Counter[int] = Counter()
        for gram in grams:
            shared.update(seen[gram])
            seen[gram].append(row)
        for other, count in shared.items():
            if count > share * min(len(grams), len(rare[other])):
                forest.join(groups[row], groups[other])
    return len(common)


def _asked(row: Conversation) -> str:
    return "\n".join(message["content"] for message in row.messages if message["role"] == "user")


def _digest(words: Sequence[str]) -> int:
    digest = hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
