"""What `generate` hands to a decoding method: settings, processors and criteria.

Knows prepared generation configurations, stopping criteria and lists of processors.
Does not know scores, rows that tripped, or loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from safe_decode.engines.transformers.coverage import options_in_force
from safe_decode.session.turns import Turns
from safe_decode.typing import CausalLM, GenerationSettings

__all__ = [
    "CallSettings",
    "ChoiceWatcher",
    "CriteriaList",
    "Follower",
    "OWN_END_SHARE",
    "PreparedSettings",
    "ProcessorList",
    "WatchedCriteria",
    "chooses_end",
    "models_ends",
    "reweighs",
    "settings_of",
]


@dataclass(frozen=True)
class CallSettings:
    """How a call generates, after transformers has merged every default.

    Attributes:
        max_new_tokens: The cap.
        do_sample: Whether tokens are drawn.
        temperature: As transformers has it; 1.0 where unset.
        top_p: 1.0 where unset.
        top_k: 0 where unset.
        end_ids: EOS ids, ascending; empty where the model has none.
        pad_id: Fills ended rows; None where neither pad nor EOS is set.
        options: What else moves the responses, see
            `engines.transformers.coverage.options_in_force`.
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    end_ids: tuple[int, ...]
    pad_id: int | None
    options: Mapping[str, str] = field(default_factory=dict)


class PreparedSettings(GenerationSettings, Protocol):
    """A GenerationConfig as `generate` hands it to a decoding method, every default merged."""

    do_sample: bool
    max_length: int
    return_dict_in_generate: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    _eos_token_tensor: Tensor | None
    _pad_token_tensor: Tensor | None


class ProcessorList(Protocol):
    """A LogitsProcessorList: all processors of a call, in order."""

    def __iter__(self) -> Iterator[object]:
        """Yield the processors."""

    def __len__(self) -> int:
        """Count the processors."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Run them over ids [batch, seq] and scores [batch, vocab]."""


class CriteriaList(Protocol):
    """A StoppingCriteriaList: all criteria of a call."""

    def __iter__(self) -> Iterator[object]:
        """Yield the criteria."""

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Return [batch] bool, rows that end."""


class Follower(Protocol):
    """Who is told of each choice while the loop runs, as a stream does; may raise to end it."""

    def on_choice(
        self, newest: Sequence[int], turns: Turns | None, trips: Mapping[int, Any]
    ) -> None:
        """Take note of one choice.

        Args:
            newest: [batch] the chosen ids; pads in rows that are over.
            turns: What they are to their rows; None: each row that is not over says its own.
            trips: Rows that have tripped.
        """
        ...

    def on_end(self, wanted: Sequence[int], trips: Mapping[int, Any]) -> None:
        """Take note that all rows have ended and their tails were judged.

        Args:
            wanted: [batch] unseen tokens that were to be judged behind each response.
            trips: Rows that have tripped.
        """
        ...


class ChoiceWatcher(Protocol):
    """Who is told of each choice."""

    @property
    def has_bare_ended(self) -> bool:
        """Say whether bare `generate` would have ended: nobody else is asked any more."""
        ...

    def on_done(self, input_ids: Tensor, done: Tensor) -> Tensor:
        """Take note of the chosen ids [batch, seq]; return [batch] bool, rows that end."""
        ...


class WatchedCriteria:
    """A StoppingCriteriaList that tells the guard. Duck-typed: `_sample` iterates and calls.

    Args:
        criteria: The list.
        loop: Told of each choice.
    """

    def __init__(self, criteria: CriteriaList, loop: ChoiceWatcher) -> None:
        self._criteria, self._loop = criteria, loop
        self.max_length: int | None = None  # the loop may look behind it

    def __iter__(self) -> Iterator[object]:
        return iter(self._criteria)

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Ask the criteria, and the guard."""
        if self._loop.has_bare_ended:
            done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        else:
            done = self._criteria(input_ids, scores, **kwargs)
        return self._loop.on_done(input_ids, done)


_OF_THE_DRAW = frozenset(
    {
        *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper"),
        *("MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper"),
        *("LogitNormalization", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"),
    }
)
"""Processors that sharpen or truncate the model's own distribution, or put an end off."""


OWN_END_SHARE = 0.05
"""What the model's own distribution gives to its ends where one of them is its own choice.

Only asked where processors reweigh the scores, as a bias does: they could end any row anywhere.
An end that sampling alone reaches in one of twenty draws is one that nobody has to force."""


def chooses_end(scores: Tensor, ends: Tensor) -> Tensor:
    """Say where an end would be the model's own choice.

    Args:
        scores: [batch, vocab] the model's own.
        ends: [n] ids on the same device, at least one.

    Returns:
        [batch] bool.
    """
    shares = scores.index_select(-1, ends).logsumexp(-1) - scores.logsumexp(-1)
    return shares >= math.log(OWN_END_SHARE)


def models_ends(model: CausalLM) -> frozenset[int]:
    """Read the ids at which a model itself ends its turn; empty if it does not say."""
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(source, "eos_token_id", None)
        if ends is not None:
            return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()


def reweighs(processors: Iterable[object]) -> bool:
    """Say whether processors may make an end likely that the model finds unlikely."""
    return any(type(processor).__name__ not in _OF_THE_DRAW for processor in processors)


def settings_of(config: PreparedSettings, prompt_tokens: int) -> CallSettings:
    """Read a prepared GenerationConfig; `prompt_tokens` are the columns of the prompt."""
    ends, pad = config._eos_token_tensor, config._pad_token_tensor
    return CallSettings(
        max_new_tokens=int(config.max_length) - prompt_tokens,
        do_sample=bool(config.do_sample),
        temperature=1.0 if config.temperature is None else float(config.temperature),
        top_p=1.0 if config.top_p is None else float(config.top_p),
        top_k=0 if config.top_k is None else int(config.top_k),
        end_ids=() if ends is None else tuple(sorted(ends.tolist())),
        pad_id=None if pad is None else int(pad),
        options=options_in_force(config),
    )
