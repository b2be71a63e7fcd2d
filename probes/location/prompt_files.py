"""What location reads: refusals of harmful prompts and answers to benign ones.

A file holds prompts, which the model then answers itself, or prompts with the model's own
responses; never both kinds, since half a file of someone else's text would go unnoticed.

Knows files of prompts, sampling and the sorting of responses. Does not know importance.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from probes.data.conversations import Conversation, Split, conversation_from
from probes.data.further_columns import native_record
from probes.data.refusal_rule import refuses
from probes.rollouts.generate import RolloutConfig, rollout
from probes.rollouts.types import Request
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["LocationData", "PromptFile", "answered", "location_data", "read_prompts"]

_FIELDS = {"prompt", "messages", "group", "prompt_harmful", "category", "split", "meta"}


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Prompts, or prompts with responses; one of the two is empty.

    Attributes:
        path: Where they were read.
        digest: blake2b of the file's bytes, 16 hexadecimal digits.
        requests: To be answered.
        conversations: Answered already.
        left_out: Rows that belong to another split than the one wanted.
    """

    path: Path
    digest: str
    requests: tuple[Request, ...] = ()
    conversations: tuple[Conversation, ...] = ()
    left_out: int = 0

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.requests) + len(self.conversations)

    def asked(self) -> tuple[Request, ...]:
        """Return what was asked, without the responses that some files hold."""
        return self.requests + tuple(
            Request(
                messages=row.messages,
                group=row.group,
                prompt_harmful=row.prompt_harmful,
                category=row.category,
                split=row.split,
            )
            for row in self.conversations
        )


class LocationData(NamedTuple):
    """Responses sorted for location.

    Attributes:
        refusals: Responses to harmful prompts that refuse.
        benign: Responses to benign prompts that do not.
        counts: JSON: how many were given, refused and kept.
    """

    refusals: list[Conversation]
    benign: list[Conversation]
    counts: dict[str, int]


def read_prompts(path: str | os.PathLike[str], *, split: Split = "locate") -> PromptFile:
    """Read JSON lines with `prompt` or `messages`, and a `response` in all rows or in none.

    Rows that carry another split than `split` are left out and counted: what is located
    on must not be reported on. Further columns are put aside into `meta`.

    Raises:
        DataError: A row cannot be used, some rows have a response and others not, or no row
            is left; the message names the file and the line.
    """
    try:
        content = Path(path).read_bytes()
        lines = content.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{os.fspath(path)} cannot be read as UTF-8 text: {error}.") from error
    rows = [_parsed(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    file = PromptFile(path=Path(path), digest=digest)
    with_response = sum("response" in row for _, row in rows)
    if with_response == len(rows):
        read = [_answered(path, number, row) for number, row in rows]
        kept = tuple(row for row in read if row.split in (None, split))
        file = replace(file, conversations=kept, left_out=len(read) - len(kept))
    elif with_response:
        number = next(number for number, row in rows if "response" not in row)
        raise DataError(
            f"{os.fspath(path)}:{number}: the row has no response, {with_response} others have; "
            "give all of them a response, or none."
        )
    else:
        asked = [_request(path, number, row) for number, row in rows]
        wanted = tuple(row for row in asked if row.split in (None, split))
        file = replace(file, requests=wanted, left_out=len(asked) - len(wanted))
    if not len(file):
        raise DataError(
            f"{os.fspath(path)} has no row to use ({file.left_out} belong to other splits); "
            f"pass prompts without a split, or of the split {split}."
        )
    return file


def answered(
    model: CausalLM,
    tokenizer: Tokenizer,
    file: PromptFile,
    *,
    samples: int = 1,
    config: RolloutConfig | None = None,
) -> list[Conversation]:
    """Return the file's responses, or let the model give its own.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        file: See `read_prompts`.
        samples: Responses to each prompt, where the model gives them.
        config: How they are generated.

    Raises:
        ConfigurationError: Several samples without sampling would all be alike.
        PromptError: A prompt and the cap exceed the model's context.
    """
    config = config or RolloutConfig()
    if samples < 1 or (samples > 1 and not config.do_sample):
        raise ConfigurationError(
            f"samples={samples} must be 1 without sampling, else at least 1; pass a temperature."
        )
    if file.conversations:
        return list(file.conversations)
    return rollout(model, tokenizer, list(file.requests) * samples, config=config)


def location_data(
    harmful: Sequence[Conversation],
    benign: Sequence[Conversation],
    *,
    min_refusals: int,
    phrases: Sequence[str] = (),
) -> LocationData:
    """Keep the refusals of harmful prompts and the answers to benign ones.

    Args:
        harmful: The model's responses to harmful prompts.
        benign: Its responses to benign prompts; refusals among them are dropped, so that
            safety does not leak into utility.
        min_refusals: Distinct refusals wanted.
        phrases: See `data.refusal_rule.is_refusal`.

    Raises:
        DataError: Too few distinct refusals, or no benign answer.
    """
    refusals = [row for row in harmful if refuses(row, phrases=phrases)]
    answers = [row for row in benign if not refuses(row, phrases=phrases)]
    distinct = len({row.response for row in refusals})
    if distinct < min_refusals:
        raise DataError(
            f"of {len(harmful)} responses to harmful prompts {len(refusals)} refuse, in {distinct} "
            f"distinct texts, wanted at least {min_refusals}; pass more harmful prompts, or "
            "several samples of each at a temperature."
        )
    if not answers:
        raise DataError(
            f"all {len(benign)} responses to benign prompts refuse; pass prompts the model answers."
        )
    counts = {
        "harmful_responses": len(harmful),
        "refusals": len(refusals),
        "distinct_refusals": distinct,
        "benign_responses": len(benign),
        "benign_answers": len(answers),
    }
    return LocationData(refusals, answers, counts)


def _parsed(path: str | os.PathLike[str], number: int, line: str) -> tuple[int, dict[str, Any]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{os.fspath(path)}:{number}: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{os.fspath(path)}:{number}: the row is a {type(row).__name__}, wanted a JSON object."
        )
    return number, native_record(row)


def _answered(path: str | os.PathLike[str], number: int, row: dict[str, Any]) -> Conversation:
    try:
        return conversation_from(row)
    except DataError as error:
        raise DataError(f"{os.fspath(path)}:{number}: {error}") from error


def _request(path: str | os.PathLike[str], number: int, row: dict[str, Any]) -> Request:
    """Check a prompt as a conversation is checked."""
    try:
        if unknown := set(row) - _FIELDS:
            raise DataError(f"unknown fields {sorted(unknown)}; put them under meta.")
        checked = conversation_from({**row, "response": ""})
    except DataError as error:
        raise DataError(f"{os.fspath(path)}:{number}: {error}") from error
    return Request(
        messages=checked.messages,
        group=checked.group,
        prompt_harmful=checked.prompt_harmful,
        category=checked.category,
        split=checked.split,
        meta=checked.meta,
    )
