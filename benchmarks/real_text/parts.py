"""Labelled responses, long benign answers and a model's own answers, each with its part in a study.

A prompt has one part, whatever file it stands in: *fit* (probes are fitted on it), *select*
(statistics, layers and penalties are chosen on it), *certify* (thresholds are calibrated on one
half, tested on the other), *other* (left out). A harmless prompt whose answers certify is nowhere
fitted on. The rows of the development set are *dev*: nothing is chosen by them.

Knows the files and their columns. Does not know models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from probes.data.conversations import Conversation, conversation_from
from probes.data.refusal_rule import is_refusal

__all__ = ["Part", "StudyRow", "sampled", "study_rows"]

Part = Literal["fit", "select", "certify", "dev", "other"]


@dataclass(frozen=True, slots=True)
class StudyRow:
    """A response and what a study does with it.

    Attributes:
        name: File and line.
        part: See the module.
        source: Which set the row comes from.
        harmful: The label; None where nobody judged it.
        refusal: Whether it opens like a refusal.
        conversation: Prompt and response; the response begins with `prefill`.
        prefill: What was put into the model's mouth.
        group: The prompt, normalised.
        is_known_prompt: The prompt stands among the rows that are fitted on.
    """

    name: str
    part: Part
    source: str
    harmful: bool | None
    refusal: bool
    conversation: Conversation
    prefill: str
    group: str
    is_known_prompt: bool


def study_rows(data: Path) -> list[StudyRow]:
    """Read every file of a directory and give each row its part."""
    written = list(_lines(data / "probe_train.jsonl"))
    dev = list(_lines(data / "probe_dev.jsonl"))
    long = list(_lines(data / "long_benign.jsonl"))
    own = list(_lines(data / "qwen_onpolicy.jsonl"))
    dev_prompts = {_group(row["prompt"]) for _, row in dev}
    kept_apart = {
        _group(row["prompt"])
        for _, row in [*long, *own]
        if _is_benign(row) and _part_of(_group(row["prompt"]), _LONG) != "fit"
    }
    known = {_group(row["prompt"]) for _, row in written} - kept_apart - dev_prompts
    rows = []
    for name, row in written:
        group = _group(row["prompt"])
        part: Part = "other" if group in kept_apart | dev_prompts else _part_of(group, _WRITTEN)
        rows.append(_row(name, row, part, row["source"], row["response_harmful"] == 1, True))
    for name, row in dev:
        harmful = row["response_harmful"] == 1
        rows.append(_row(name, row, "dev", row["source"], harmful, _group(row["prompt"]) in known))
    seen: set[str] = set()
    for name, row in long:
        group = _group(row["prompt"])
        first = group not in seen
        seen.add(group)
        part = _part_of(group, _LONG) if first and group not in dev_prompts else "other"
        rows.append(_row(name, row, part, row["source"], False, group in known))
    for name, row in own:
        group = _group(row["prompt"])
        if _is_benign(row):
            part, harmful = _part_of(group, _LONG), False
        else:
            part = "certify" if group in dev_prompts else _part_of(group, _OWN_HARMFUL)
            harmful = None
        rows.append(_row(name, row, part, f"own {row['kind']}", harmful, group in known))
    return rows


_WRITTEN: Mapping[Part, float] = {"fit": 0.8, "select": 0.2}
_LONG: Mapping[Part, float] = {"fit": 0.12, "select": 0.12, "certify": 0.76}
_OWN_HARMFUL: Mapping[Part, float] = {"fit": 0.3, "select": 0.1, "certify": 0.6}


def sampled(group: str, share: float) -> bool:
    """Say whether a prompt is among a share of all."""
    place = int.from_bytes(hashlib.sha256(f"sample {group}".encode()).digest()[:8], "big")
    return place / 2**64 < share


def _part_of(group: str, shares: Mapping[Part, float]) -> Part:
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    for part, share in shares.items():
        if place < share:
            return part
        place -= share
    return part


def _is_benign(row: Mapping[str, Any]) -> bool:
    return str(row.get("kind", "benign")).startswith("benign")


def _group(prompt: str) -> str:
    return re.sub(r"\W+", " ", prompt.lower()).strip()


def _row(  # noqa: PLR0913
    name: str,
    row: Mapping[str, Any],
    part: Part,
    source: str,
    harmful: bool | None,
    known: bool,
) -> StudyRow:
    prefill = str(row.get("prefill") or "")
    joint = " " if prefill and row["response"][:1].isalnum() and prefill[-1:].isalnum() else ""
    response = prefill + joint + row["response"]
    conversation = conversation_from(
        {"prompt": row["prompt"], "response": response, "group": _group(row["prompt"])}
    )
    refusal = is_refusal(row["response"])
    return StudyRow(
        name, part, source, harmful, refusal, conversation, prefill, _group(row["prompt"]), known
    )


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield f"{path.name}:{number}", json.loads(line)
