"""Labelled conversations: one record a response, its file format, and its split.

Knows fields, their validity, JSON lines and the group-disjoint split. Does not know
tokenizers, models or who judged a response.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from probes.data.generation import Generation
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.whole_files import whole_file

__all__ = [
    "DEFAULT_SHARES",
    "SPLITS",
    "Conversation",
    "Message",
    "Split",
    "assign_splits",
    "by_split",
    "conversation_from",
    "read_jsonl",
    "split_of",
    "write_jsonl",
]

Split = Literal["locate", "fit", "select", "calibrate", "test"]
"""locate: importance scores. fit: probe weights. select: every choice among fitted probes.
calibrate: opened once, after everything is frozen. test: reported figures."""

SPLITS: tuple[Split, ...] = get_args(Split)
DEFAULT_SHARES: Mapping[Split, float] = {
    "locate": 0.1,
    "fit": 0.3,
    "select": 0.15,
    "calibrate": 0.3,
    "test": 0.15,
}

Message = Mapping[str, str]
"""One turn, with the keys `role` and `content`."""

_ROLES = ("system", "user", "assistant")
_SHARE_TOLERANCE = 1e-9  # shares written as decimals do not add to exactly 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A prompt, the response to it, and what is known about the response.

    Attributes:
        messages: The turns before the response; the last one is the user's.
        response: The assistant's text, a supplied prefill included.
        group: Rows that share a group are never split; for calibration a group is one draw.
        response_harmful: Whether the response does harm; None when not judged.
        prompt_harmful: Whether the request asks for harm; None when not judged.
        refusal: Whether the response refuses; None when not judged.
        category: Harm category or benign topic, for tables.
        onset_char: Index into `response` of the first character of the first harmful clause.
        split: Which of the five splits the row belongs to.
        response_ids: The generated token ids, end-of-sequence excluded. When present,
            activations are read on exactly these; re-tokenising text may yield others.
        prefill_tokens: How many leading `response_ids` were supplied, not generated.
        ended: Whether the model itself ended the response; None for text from elsewhere.
        generation: By which model it was generated, and how; None for text from elsewhere.
        meta: Anything else JSON can hold, such as framing, plan or population.

    Raises:
        DataError: A field has a wrong type or value, or contradicts another.
    """

    messages: tuple[Message, ...]
    response: str
    group: str
    response_harmful: bool | None = None
    prompt_harmful: bool | None = None
    refusal: bool | None = None
    category: str | None = None
    onset_char: int | None = None
    split: Split | None = None
    response_ids: tuple[int, ...] | None = None
    prefill_tokens: int = 0
    ended: bool | None = None
    generation: Generation | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_messages(self.messages)
        for name in ("response", "group"):
            if not isinstance(getattr(self, name), str):
                raise DataError(f"{name}={getattr(self, name)!r} is not a string; pass text.")
        if not self.group:
            raise DataError("group is empty; pass a name shared by all variants of one prompt.")
        if self.category is not None and not isinstance(self.category, str):
            raise DataError(f"category={self.category!r} is not a string; pass text or null.")
        for name in ("response_harmful", "prompt_harmful", "refusal", "ended"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise DataError(f"{name}={value!r} is not true, false or null; pass one of these.")
        if self.split is not None and self.split not in SPLITS:
            raise DataError(f"split={self.split!r} is not one of {SPLITS}; pass one, or null.")
        if not isinstance(self.meta, Mapping):
            raise DataError(f"meta={self.meta!r} is not an object; pass a mapping.")
        self._check_onset()
        self._check_ids()

    def _check_onset(self) -> None:
        if self.onset_char is None:
            return
        if not _is_count(self.onset_char) or self.onset_char >= len(self.response):
            raise DataError(
                f"onset_char={self.onset_char!r} is outside the response of "
                f"{len(self.response)} characters; pass the index of a character in it."
            )
        if self.response_harmful is False:
            raise DataError("onset_char is set but response_harmful is false; drop one of them.")

    def _check_ids(self) -> None:
        ids = self.response_ids
        if ids is not None and not all(_is_count(i) for i in ids):
            raise DataError("response_ids holds values that are not token ids; pass integers >= 0.")
        limit = 0 if ids is None else len(ids)
        if not _is_count(self.prefill_tokens) or self.prefill_tokens > limit:
            raise DataError(
                f"prefill_tokens={self.prefill_tokens!r} is outside 0..{limit}, the length of "
                "response_ids; pass how many of them were supplied."
            )

    @property
    def prompt(self) -> str:
        """The user's last message."""
        return self.messages[-1]["content"]


def read_jsonl(path: str | os.PathLike[str]) -> list[Conversation]:
    """Read conversations from a JSON-lines file; blank lines are skipped.

    A row holds the fields of `Conversation`, with `prompt` allowed in place of `messages`,
    0 and 1 in place of false and true. A missing `group` is the digest of the messages.

    Raises:
        DataError: A row cannot be used; the message names the file and the line.
    """
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(_decoded(lines, path), start=1):
            if not line.strip():
                continue
            try:
                rows.append(conversation_from(json.loads(line)))
            except (DataError, json.JSONDecodeError) as error:
                raise DataError(f"{os.fspath(path)}:{number}: {error}") from error
    return rows


def write_jsonl(path: str | os.PathLike[str], conversations: Iterable[Conversation]) -> None:
    """Write conversations as JSON lines; a reader never sees a half-written file."""
    with whole_file(path) as part, open(part, "w", encoding="utf-8") as out:
        for row in conversations:
            out.write(json.dumps(_to_json(row), ensure_ascii=False) + "\n")


def split_of(group: str, *, seed: int = 0, shares: Mapping[Split, float] = DEFAULT_SHARES) -> Split:
    """Assign a group to a split by a seeded hash, independent of all other groups.

    Adding or dropping rows therefore never moves another row to a different split.

    Raises:
        ConfigurationError: Shares are negative, do not add to 1, or name unknown splits.
    """
    if set(shares) - set(SPLITS) or any(share < 0 for share in shares.values()):
        raise ConfigurationError(f"shares={dict(shares)} must map {SPLITS} to shares >= 0.")
    if abs(sum(shares.values()) - 1.0) > _SHARE_TOLERANCE:
        raise ConfigurationError(f"shares add to {sum(shares.values())}, not to 1; scale them.")
    digest = hashlib.blake2b(f"{seed}\x1f{group}".encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "big") / 2**64
    edge = 0.0
    for split in SPLITS:
        edge += shares.get(split, 0.0)
        if draw < edge:
            return split
    return next(split for split in reversed(SPLITS) if shares.get(split, 0.0) > 0)


def assign_splits(
    conversations: Iterable[Conversation],
    *,
    seed: int = 0,
    shares: Mapping[Split, float] = DEFAULT_SHARES,
) -> list[Conversation]:
    """Give every conversation the split of its group, replacing any it had."""
    return [replace(c, split=split_of(c.group, seed=seed, shares=shares)) for c in conversations]


def by_split(conversations: Iterable[Conversation]) -> dict[Split, list[Conversation]]:
    """Sort conversations into the five splits and refuse a leak between them.

    Raises:
        DataError: A conversation has no split, or a group stands in two splits.
    """
    parts: dict[Split, list[Conversation]] = {split: [] for split in SPLITS}
    home: dict[str, Split] = {}
    for row in conversations:
        if row.split is None:
            raise DataError(f"group {row.group!r} has no split; call assign_splits first.")
        if home.setdefault(row.group, row.split) != row.split:
            raise DataError(
                f"group {row.group!r} stands in the splits {home[row.group]!r} and {row.split!r}; "
                "a group belongs to one split only."
            )
        parts[row.split].append(row)
    return parts


def _decoded(lines: Iterable[str], path: str | os.PathLike[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise DataError(f"{os.fspath(path)} is not UTF-8: {error}; convert it.") from error


def _check_messages(messages: Sequence[Message]) -> None:
    if not isinstance(messages, tuple) or not messages:
        raise DataError(f"messages={messages!r} is not a non-empty tuple; pass at least one turn.")
    for message in messages:
        valid = isinstance(message, Mapping) and set(message) == {"role", "content"}
        if not valid or not isinstance(message["content"], str):
            raise DataError(f"message {message!r} must have exactly the texts role and content.")
        if message["role"] not in _ROLES:
            raise DataError(f"role={message['role']!r} is not one of {_ROLES}; pass one of these.")
    if messages[-1]["role"] != "user":
        raise DataError(
            f"the last of the messages is the {messages[-1]['role']}'s, wanted the user's; "
            "the answer to be judged belongs in response."
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def conversation_from(row: object) -> Conversation:
    """Make a conversation of a row of JSON, as `read_jsonl` describes it.

    Raises:
        DataError: The row cannot be used.
    """
    values = _known_fields(row)
    if "prompt" in values:
        values["messages"] = [{"role": "user", "content": values.pop("prompt")}]
    for name in ("response_harmful", "prompt_harmful", "refusal", "ended"):
        if type(values.get(name)) is int and values[name] in (0, 1):
            values[name] = bool(values[name])
    for name in ("messages", "response_ids"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    if values.get("generation") is not None:
        values["generation"] = Generation.from_json(values["generation"])
    if values.get("group") is None:
        values["group"] = _digest(values["messages"])
    return Conversation(**values)


def _known_fields(row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"the row is a {type(row).__name__}, wanted a JSON object.")
    if ("prompt" in row) == ("messages" in row):
        raise DataError("the row needs either prompt or messages, exactly one of them.")
    unknown = set(row) - {f.name for f in fields(Conversation)} - {"prompt"}
    if unknown:
        raise DataError(f"unknown fields {sorted(unknown)}; put them under meta.")
    if "response" not in row:
        raise DataError("the row has no response; add the text to be judged.")
    return dict(row)


def _digest(messages: object) -> str:
    canonical = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


def _to_json(row: Conversation) -> dict[str, Any]:
    values = {f.name: getattr(row, f.name) for f in fields(Conversation)}
    values["messages"] = [dict(message) for message in row.messages]
    values["meta"] = dict(row.meta) or None
    values["generation"] = row.generation and row.generation.to_json()
    values["prefill_tokens"] = row.prefill_tokens or None
    return {name: value for name, value in values.items() if value is not None}
