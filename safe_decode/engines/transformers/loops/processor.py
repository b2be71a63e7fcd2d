"""The guard inside a user's own `model.generate`: a logits processor and a stopping criterion.

Knows one call of a processor and of a criterion a step, forced ids and ends of rows. Does
not know the loop around it: it cannot take tokens back, so a tripped row says the refusal
after what stands, and rewind is refused by name. The only module that subclasses classes of
transformers, which is why it is imported late.

What a processor cannot do: see the option list of the `generate` that runs it (the beats
catch what skips or doubles a forward), run a closing forward (the trace says
`unscored_tail` = 1), or keep other processors from running after it (the next step finds
that a forced id did not arrive, and ends the whole call by an error).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

__all__ = ["ChoiceStep", "SafetyLogitsProcessor", "SafetyStoppingCriteria", "ScoresStep"]


class ScoresStep(Protocol):
    """Who stands behind the processor."""

    def on_scores(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Judge the forward that made `scores`; return what the choice is made from."""
        ...


class ChoiceStep(Protocol):
    """Who stands behind the criterion."""

    def on_choice(self, input_ids: Tensor) -> Tensor:
        """Take note of the chosen ids; return [batch] bool, rows that end."""
        ...


class SafetyLogitsProcessor(LogitsProcessor):
    """Calls the guard before each choice. Must be the last of the custom processors."""

    def __init__(self, steps: ScoresStep) -> None:
        self._steps = steps

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Judge [batch, seq] ids; return `scores` itself, or a new tensor where a row is forced."""
        return self._steps.on_scores(input_ids, scores)  # type: ignore[return-value]


class SafetyStoppingCriteria(StoppingCriteria):
    """Ends rows whose redirect is said."""

    def __init__(self, steps: ChoiceStep) -> None:
        self._steps = steps

    def __call__(
        self, input_ids: torch.LongTensor, scores: object, **kwargs: object
    ) -> torch.BoolTensor:
        """Return [batch] bool, True where the row ends."""
        del scores, kwargs
        return self._steps.on_choice(input_ids)  # type: ignore[return-value]
