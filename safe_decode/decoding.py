"""What `generate` hands to a decoding method, and what one more forward needs of it.

Knows prepared generation configurations, stopping criteria and the arguments of a forward.
Does not know scores, rows that tripped, or loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from safe_decode.coverage import options_in_force

__all__ = [
    "CallSettings",
    "ChoiceWatcher",
    "Follower",
    "PrefillSpan",
    "WatchedCriteria",
    "WatchedProcessors",
    "forget",
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
        options: What else moves the responses, see `coverage.options_in_force`.
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
        self, newest: Sequence[int], done: Sequence[bool], trips: Mapping[int, Any]
    ) -> None:
        """Take note of one chosen id a row, rows that are done, and rows that tripped."""
        ...

    def on_end(self, trips: Mapping[int, Any]) -> None:
        """Take note that all rows have ended and their tails were judged."""
        ...


class WatchedProcessors:
    """A LogitsProcessorList with the guard's own behind it, of which only the call is used.

    The list inspects the signature of each processor before each call, which costs more than
    the guard's whole step; so the guard's own is not in it.
    """

    def __init__(self, processors: Any, guard: Callable[[Any, Any], Any]) -> None:  # noqa: ANN401
        self._processors, self._guard = processors, guard

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ANN401
        """Run the list, then the guard's own."""
        if self._processors:
            scores = self._processors(input_ids, scores)
        return self._guard(input_ids, scores)


class ChoiceWatcher(Protocol):
    """Who is told of each choice."""

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
        self.max_length = criteria.max_length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._criteria)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Ask the criteria, and the guard."""
        return self._loop.on_done(input_ids, self._criteria(input_ids, scores, **kwargs))


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
    """

    positions: int
    is_partial: bool
    keeps_cache: bool
    is_full: bool

    @classmethod
    def of(cls, input_ids: Tensor, config: Any, model_kwargs: dict[str, Any]) -> PrefillSpan:  # noqa: ANN401
        """Read it before the first forward."""
        cache, embeds = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
        cached = 0 if cache is None else int(cache.get_seq_length())
        width = (input_ids if embeds is None else embeds).shape[1]
        is_users = bool(getattr(cache, "_is_user_defined", False))
        return cls(
            positions=width - cached,
            is_partial=cached > 0,
            keeps_cache=is_users or bool(config.return_dict_in_generate),
            is_full=bool(getattr(cache, "is_compileable", False)),
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
