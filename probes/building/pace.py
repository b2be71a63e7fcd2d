"""How fast this machine generates and reads, measured on the first rows of a build.

Knows clocks and how a step's time follows from its tokens. Does not know labels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from probes.activations.teacher_forcing import encode_response, visit_activations
from probes.building.plan import Plan
from probes.data.conversations import Conversation
from probes.rollouts.generate import RolloutConfig, rollout
from probes.rollouts.types import Request
from safe_decode.activations.site import Site
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["Pace", "measured_pace"]

_TRIED_TOKENS = 16
_TRIED_ROWS = 16
_PASSES = 3
"""Passes over the responses: activations, calibration with the chosen probe, evaluation."""


@dataclass(frozen=True)
class Pace:
    """Tokens a second on this machine, measured.

    Attributes:
        generated: Of generation, over a whole batch.
        read: Of reading finished responses.
    """

    generated: float
    read: float

    def minutes(self, plan: Plan, *, generated_already: int = 0) -> dict[str, float]:
        """Estimate the minutes of each step; fitting itself is not in it."""
        to_do = max(plan.generated_tokens - generated_already, 0)
        return {
            "answers": to_do / self.generated / 60,
            "reading": _PASSES * plan.read_tokens / self.read / 60,
        }


def measured_pace(
    model: CausalLM,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    config: RolloutConfig,
) -> Pace:
    """Generate and read a first batch, and time both; what was generated is thrown away.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        requests: At least one.
        config: As answers will be generated; the cap is lowered.
    """
    first = list(requests[: config.batch_size])
    short = replace(config, max_new_tokens=min(_TRIED_TOKENS, config.max_new_tokens))
    # What is done once only would be counted for every token.
    rollout(model, tokenizer, first, config=replace(short, max_new_tokens=1))
    begun = time.perf_counter()
    said = rollout(model, tokenizer, first, config=short)
    generated = len(first) * short.max_new_tokens / (time.perf_counter() - begun)
    rows = [encode_response(tokenizer, _longer(row)) for row in said[:_TRIED_ROWS]]
    begun = time.perf_counter()
    visit_activations(model, (Site(0, "resid", (0,)),), rows, lambda *_: None, description="timing")
    read = sum(len(row.ids) for row in rows) / (time.perf_counter() - begun)
    return Pace(generated, read)


def _longer(row: Conversation) -> Conversation:
    """Repeat a short answer, so that reading is timed on a usual length."""
    ids = row.response_ids or ()
    return replace(row, response_ids=(ids * 8)[: 8 * _TRIED_TOKENS], prefill_tokens=0, ended=None)
