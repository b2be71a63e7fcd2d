"""What `generate` hands to a decoding method, and what one more forward needs of it.

Knows prepared generation configurations, stopping criteria and the arguments of a forward.
Does not know scores, rows that tripped, or loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from safe_decode.engines.transformers.coverage import options_in_force
from safe_decode.session.turns import Turns

__all__ = [
    "OWN_END_SHARE",
    "CallSettings",
    "ChoiceWatcher",
    "Follower",
    "PrefillSpan",
    "WatchedCriteria",
    "WatchedProcessors",
    "chooses_end",
    "forget",
    "models_ends",
    "reweighs",
    "settings_of",
    "tail_inputs",
    "whole_inputs",
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


class Follower(Protocol):
    """Who hears of each choice while the loop runs, as a stream does; may raise to end it."""

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


class WatchedProcessors:
    """A LogitsProcessorList with the guard's own behind it, of which only the call is used.

    The list inspects the signature of each processor before each call, which costs more than
    the guard's whole step; so the guard's own is not in it.
    """

    def __init__(
        self,
        processors: Any,  # noqa: ANN401
        guard: Callable[[Any, Any], Any],
        *,
        on_bare: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._processors, self._guard, self._on_bare = processors, guard, on_bare

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ANN401
        """Run the list, then the guard's own; before both, show the model's own scores."""
        if self._on_bare is not None:
            self._on_bare(scores)
        if self._processors:
            scores = self._processors(input_ids, scores)
        return self._guard(input_ids, scores)


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

    def __init__(self, criteria: Any, loop: ChoiceWatcher) -> None:  # noqa: ANN401
        self._criteria, self._loop = criteria, loop
        self.max_length: int | None = None  # the loop may look behind it

    def __iter__(self) -> Iterator[Any]:
        return iter(self._criteria)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
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


def chooses_end(scores: Tensor, ends: Sequence[int]) -> Tensor:
    """Say where an end would be the model's own choice.

    Args:
        scores: [batch, vocab] the model's own.
        ends: Ids, at least one.

    Returns:
        [batch] bool.
    """
    shares = scores[:, list(ends)].logsumexp(-1) - scores.logsumexp(-1)
    return shares >= math.log(OWN_END_SHARE)


def models_ends(model: Any) -> frozenset[int]:  # noqa: ANN401 - duck-typed
    """Read the ids at which a model itself ends its turn; empty if it does not say."""
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(source, "eos_token_id", None)
        if ends is not None:
            return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()


def reweighs(processors: Any) -> bool:  # noqa: ANN401 - a LogitsProcessorList
    """Say whether processors may make an end likely that the model finds unlikely."""
    return any(type(processor).__name__ not in _OF_THE_DRAW for processor in processors)


def forget(cache: Any, n_positions: int) -> None:  # noqa: ANN401 - a Cache
    """Take a cache that the user keeps back to its first positions, or empty it.

    For a call in which a row has tripped: what it said is not what stands. An emptied cache
    is filled again by the next call that passes the whole conversation.

    Args:
        cache: Changed in place.
        n_positions: Positions it had before.
    """
    surplus = int(cache.get_seq_length()) - n_positions
    try:
        # A sliding window that has moved on cannot be taken back.
        if not cache.is_croppable or n_positions == 0:
            raise RuntimeError("no crop")
        cache.crop(-surplus)
    except RuntimeError:
        cache.reset()


def settings_of(config: Any, prompt_tokens: int) -> CallSettings:  # noqa: ANN401
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


@dataclass(frozen=True)
class PrefillSpan:
    """What the prompt's forward reads.

    Attributes:
        positions: How many positions pass: those of the prompt that are not cached yet.
        is_partial: Whether positions of the prompt were cached before the call.
        keeps_cache: Whether the cache outlives the call, so that nothing may be added to it.
        is_full: Whether the cache has no place for the last token, as static caches do not.
        room: New tokens for which a cache of fixed size has places; None: it grows.
    """

    positions: int
    is_partial: bool
    keeps_cache: bool
    is_full: bool
    room: int | None = None

    @classmethod
    def of(cls, input_ids: Tensor, config: Any, model_kwargs: dict[str, Any]) -> PrefillSpan:  # noqa: ANN401
        """Read it before the first forward."""
        cache, embeds = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
        cached = 0 if cache is None else int(cache.get_seq_length())
        width = (input_ids if embeds is None else embeds).shape[1]
        is_users = bool(getattr(cache, "_is_user_defined", False))
        is_full = cache is not None and bool(getattr(cache, "is_compileable", False))
        return cls(
            positions=width - cached,
            is_partial=cached > 0,
            keeps_cache=is_users or bool(config.return_dict_in_generate),
            is_full=is_full,
            # The newest token needs no place: the closing forward reads without the cache.
            room=int(cache.get_max_length()) - width + 1 if cache is not None and is_full else None,
        )


def whole_inputs(
    model: Any,  # noqa: ANN401 - duck-typed
    sequences: Tensor,
    model_kwargs: dict[str, Any],
    prompt_tokens: int,
) -> dict[str, Any]:
    """Prepare a forward over all of `sequences` [batch, seq] that reads and leaves no cache."""
    new = sequences.shape[1] - prompt_tokens
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(sequences[:, :prompt_tokens]) if mask is None else mask
    mask = torch.cat([mask, mask.new_ones((mask.shape[0], new))], -1)
    kwargs = {"attention_mask": mask, "use_cache": False, "past_key_values": None}
    if model_kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = model._prepare_position_ids_for_generation(sequences, kwargs)
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(sequences, **kwargs)
    return prepared


def tail_inputs(
    model: Any,  # noqa: ANN401 - duck-typed
    sequences: Tensor,
    prompt_tokens: int,
    model_kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Prepare the forward that reads the last column of `sequences` [batch, seq]."""
    new = sequences.shape[1] - prompt_tokens
    kwargs = dict(model_kwargs)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        kwargs["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], new))], -1)
    positions = kwargs.get("position_ids")
    if positions is not None:
        later = torch.arange(1, new + 1, device=positions.device, dtype=positions.dtype)
        kwargs["position_ids"] = torch.cat([positions, positions[..., -1:] + later], -1)
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(
        sequences, next_sequence_length=1 if kwargs.get("use_cache") else None, **kwargs
    )
    return prepared
