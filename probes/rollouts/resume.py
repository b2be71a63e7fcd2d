"""Rollouts that survive an interruption: part by part, each written whole.

While responses are generated, `FILE.parts/` holds what is done; a run with the same requests,
settings, model and judge goes on there. When all is done the parts become FILE. A part
repeats what it would have been, whether or not the run was interrupted: its seed is its own.

Knows parts on disk. Generation is known to `generate`, verdicts to `judges`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from probes.data.conversations import Conversation, read_jsonl, write_jsonl
from probes.rollouts.generate import RolloutConfig, rollout
from probes.rollouts.judges import RowJudge, judge_all
from probes.rollouts.types import Request
from probes.runs.identity import weights_digest
from safe_decode.errors import DataError
from safe_decode.prompts.chat import encode_chat
from safe_decode.typing import CausalLM, Tokenizer
from safe_decode.whole_files import remove_empty, write_whole

__all__ = ["RolloutReport", "rollout_to", "with_room"]

_RUN = "run.json"
_SEEDS_PER_PART = 1_000_000  # a part draws from a seed of its own for each of its batches


@dataclass(frozen=True)
class RolloutReport:
    """What a run did.

    Attributes:
        conversations: All of them, in the order of the requests.
        resumed: Responses that were there already.
    """

    conversations: list[Conversation]
    resumed: int


def with_room(
    model: CausalLM,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    max_new_tokens: int,
) -> list[Request]:
    """Keep the requests that leave room for a whole response in the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return list(requests)

    def tokens(request: Request) -> int:
        return len(encode_chat(tokenizer, request.messages, prefill=request.prefill).ids)

    return [request for request in requests if tokens(request) + max_new_tokens <= limit]


def rollout_to(
    path: str | os.PathLike[str],
    model: CausalLM,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    judge: RowJudge | None = None,
    config: RolloutConfig | None = None,
    judged_at_once: int = 1,
    responses_per_part: int = 512,
) -> RolloutReport:
    """Generate and judge responses into a JSON-lines file, going on where a run stopped.

    Args:
        path: The file; it is there only when all is done.
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        requests: What is asked.
        judge: Labels each response; without one the labels stay None.
        config: See `RolloutConfig`.
        judged_at_once: Threads that ask the judge.
        responses_per_part: What an interruption can cost at most.

    Raises:
        DataError: The parts on disk are of another run.
        PromptError: As in `rollout`.
    """
    config = config or RolloutConfig()
    target = Path(path)
    parts = target.with_name(f"{target.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    _claim(parts, _identity(model, requests, config, judge, responses_per_part))
    rows: list[Conversation] = []
    resumed, number = 0, -1
    for number, begin in enumerate(range(0, len(requests), responses_per_part)):
        part = _part(parts, number)
        if part.exists():
            done = read_jsonl(part)
            resumed += len(done)
        else:
            asked = requests[begin : begin + responses_per_part]
            own = replace(config, seed=config.seed + number * _SEEDS_PER_PART)
            done = rollout(model, tokenizer, asked, config=own)
            if judge is not None:
                done = judge_all(done, judge, at_once=judged_at_once)
            write_jsonl(part, done)
        rows += done
    write_jsonl(target, rows)
    for written in (*(_part(parts, n) for n in range(number + 1)), parts / _RUN):
        written.unlink(missing_ok=True)
    remove_empty(parts)  # not where somebody else has put something
    return RolloutReport(rows, resumed)


def _identity(
    model: CausalLM,
    requests: Sequence[Request],
    config: RolloutConfig,
    judge: RowJudge | None,
    per_part: int,
) -> str:
    asked = hashlib.sha256()
    for request in requests:
        asked.update(json.dumps(asdict(request), sort_keys=True).encode())
    facts = {
        "requests_sha256": asked.hexdigest(),
        "config": asdict(config),
        "judge": getattr(judge, "__qualname__", repr(judge)),
        "responses_per_part": per_part,
        "weights_sha256": weights_digest(model),
    }
    return json.dumps(facts, sort_keys=True)


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.jsonl"


def _claim(parts: Path, identity: str) -> None:
    path = parts / _RUN
    if not path.exists():
        if _part(parts, 0).exists():
            raise DataError(
                f"{parts} holds parts but no {_RUN} that says of which run; move it away, or "
                "write to another file."
            )
        write_whole(path, identity)
    elif path.read_text(encoding="utf-8") != identity:
        raise DataError(
            f"{parts} holds the parts of another run (other requests, settings, model or judge); "
            "delete it, or write to another file."
        )
