"""Rows that say that a model wrote them, without a rollout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from probes.activations.teacher_forcing import encode_response
from probes.data.conversations import Conversation
from probes.data.generation import Generation
from probes.runs.identity import weights_digest


def as_own(
    model: Any, tokenizer: Any, rows: Iterable[Conversation], *, cap: int = 64, **sampling: Any
) -> list[Conversation]:
    """Give each row the ids of its text and the record of a rollout that it ended itself."""
    generation = Generation(
        weights=weights_digest(model),
        max_new_tokens=cap,
        **{"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **sampling},
    )
    found = []
    for row in rows:
        encoded = encode_response(tokenizer, row)
        ids = encoded.ids[encoded.turn_start :]
        found.append(replace(row, response_ids=tuple(ids), ended=True, generation=generation))
    return found
