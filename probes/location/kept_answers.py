"""Responses to the prompts of a location, kept on disk so that an interrupted run goes on.

Knows a directory, and what the responses in it were made of. Does not know how a model answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from probes.data.conversations import Conversation, read_jsonl, write_jsonl
from safe_decode.errors import ConfigurationError
from safe_decode.whole_files import write_whole

__all__ = ["kept_answers"]


def kept_answers(
    kept: Path | None,
    name: str,
    made_of: Mapping[str, object],
    answer: Callable[[], list[Conversation]],
) -> list[Conversation]:
    """Return the responses that an ended run has left, or let the model answer and keep them.

    Args:
        kept: Directory that keeps them; None keeps nothing.
        name: Of the two files in it.
        made_of: What the responses depend on: prompts and options, as JSON can write it.
        answer: Generates the responses.

    Raises:
        ConfigurationError: What is kept was made of something else.
    """
    if kept is None:
        return answer()
    path, note = kept / f"{name}.jsonl", kept / f"{name}.json"
    told = json.dumps(made_of, sort_keys=True)
    if path.exists() and note.exists():
        if note.read_text(encoding="utf-8") != told:
            raise ConfigurationError(
                f"{kept} keeps responses to other prompts or of other options; pass another "
                "directory, or delete what it holds."
            )
        return read_jsonl(path)
    rows = answer()
    write_jsonl(path, rows)
    write_whole(note, told)
    return rows
