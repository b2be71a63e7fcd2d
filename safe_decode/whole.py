"""Responses judged when they are whole: beam search, assisted decoding, prompt lookup.

Knows decoding methods that reorder rows or propose several tokens at once, and how to pick
among beams. Does not know redirects, texts or traces.

These methods run as they are, unheard; then one forward over the finished responses gives
each of their tokens its one score, in order, and nothing is shown before. So a row that does
not trip is bare, whatever the cache does meanwhile. What it costs: one forward over the
whole batch, and a response that trips is written to its end before it is redirected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from safe_decode.decoding import CallSettings, settings_of, whole_inputs
from safe_decode.session import Session
from safe_decode.taps import internal

__all__ = ["Method", "WholeLoop", "method_of", "picked_beams", "pruned_beams"]

Method = Literal["step", "beams", "assisted"]
"""step: judged while it is written. beams, assisted: judged when whole."""

_METHODS: Mapping[Method, str] = {"beams": "_beam_search", "assisted": "_assisted_decoding"}


def method_of(option: Callable[[str], Any]) -> Method:
    """Say how a call decodes.

    Args:
        option: Reads an option of the call by its name.
    """
    if option("assistant_model") is not None or option("prompt_lookup_num_tokens"):
        return "assisted"
    return "beams" if (option("num_beams") or 1) > 1 else "step"


class WholeLoop:
    """A decoding method for `model.generate(custom_generate=...)`; good for one call.

    Args:
        session: For the rows that the method returns.
        method: Which method runs.
        require: Called with the settings before the first forward; may raise.
        assistant: Keyword arguments of the method about its assistant.

    Attributes:
        fill_id: What stands behind a response that is shorter than its neighbours.
    """

    def __init__(
        self,
        session: Session,
        method: Method,
        *,
        require: Callable[[CallSettings], None] | None = None,
        assistant: Mapping[str, Any] | None = None,
    ) -> None:
        self.session = session
        self.settings: CallSettings | None = None
        self.ended_at: list[int] = []
        self.pads_after_end = True
        self.generation: Any = None
        self.fill_id = 0
        self._method, self._require = method, require
        self._assistant = dict(assistant or {})

    def __call__(
        self,
        model: Any,  # noqa: ANN401 - duck-typed
        input_ids: Tensor,
        logits_processor: Any,  # noqa: ANN401 - a LogitsProcessorList
        stopping_criteria: Any,  # noqa: ANN401 - a StoppingCriteriaList
        generation_config: Any,  # noqa: ANN401 - a GenerationConfig, prepared
        inputs_tensor: Tensor | None = None,
        **model_kwargs: Any,  # noqa: ANN401 - what the forward takes
    ) -> Any:  # noqa: ANN401 - as the method that it stands for
        """Generate, then judge. Raises what the method raises."""
        self.settings = settings = settings_of(generation_config, input_ids.shape[1])
        if self._require is not None:
            self._require(settings)
        self.fill_id = _fill_of(generation_config)
        given = {**self._assistant, **model_kwargs}
        if self._method == "assisted":
            given["inputs_tensor"] = inputs_tensor
        mask = model_kwargs.get("attention_mask")
        kept = {"attention_mask": mask, "position_ids": model_kwargs.get("position_ids")}
        with internal():
            self.generation = getattr(type(model), _METHODS[self._method])(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **given,
            )
        sequences: Tensor = getattr(self.generation, "sequences", self.generation)
        self._judge(model, input_ids, sequences, kept)
        return self.generation

    def _judge(
        self,
        model: Any,  # noqa: ANN401
        input_ids: Tensor,
        sequences: Tensor,
        kept: dict[str, Any],  # noqa: ANN401
    ) -> None:
        assert self.settings is not None
        prompt_tokens, ends = input_ids.shape[1], self.settings.end_ids
        new = sequences[:, prompt_tokens:].tolist()
        fill = self.fill_id if self._method == "beams" else None
        self.ended_at = [_length(row, ends, fill) for row in new]
        content = [
            n - (n > 0 and row[n - 1] in ends) for n, row in zip(self.ended_at, new, strict=True)
        ]
        try:
            inputs = whole_inputs(model, sequences, kept, prompt_tokens)
            self.session.expect_whole(sequences.shape[1] - prompt_tokens)
            model(**inputs, return_dict=True)
            self.session.note(sequences, sequences.shape[1] - prompt_tokens)
            self.session.judge_whole(sequences.shape[1], content)
        except Exception as error:  # nothing may be released that was not judged
            from safe_decode.processor import as_guard_error

            self._fail(as_guard_error(error), content)

    def _fail(self, error: Any, content: Sequence[int]) -> None:  # noqa: ANN401
        session = self.session
        for row, n in enumerate(content):
            if session.policies[row].protects and session.policy.on_error == "close":
                session.park(row, said=n, error=error)
            session.errors.setdefault(row, error)


def picked_beams(tripped: Sequence[bool], is_empty: Sequence[bool], n: int) -> list[int]:
    """Pick an item's answers among its beams, best first.

    The best ones, as bare; one that tripped gives way to the next that did not, and stands,
    to be redirected, only where none is left.

    Args:
        tripped: Of each beam, by rank.
        is_empty: Of each beam, whether it says nothing; never taken instead of another.
        n: Answers wanted.
    """
    clean = [
        i for i, has_tripped in enumerate(tripped) if not has_tripped and (i < n or not is_empty[i])
    ]
    spare = [i for i, has_tripped in enumerate(tripped) if has_tripped]
    return sorted([*clean, *spare][:n])


def pruned_beams(tripped: Sequence[bool], picked: Sequence[int]) -> int:
    """Count an item's beams that bare would have returned and that gave way to others."""
    best = range(len(picked))
    return sum(tripped[i] and i not in picked for i in best)


def _fill_of(config: Any) -> int:  # noqa: ANN401 - a GenerationConfig, prepared
    """Read what beam search puts behind a response: the pad, or the first EOS where that is 0."""
    ends, pad = config._eos_token_tensor, config._pad_token_tensor
    own = 0 if pad is None else int(pad)
    return own if own or ends is None else int(ends[0])


def _length(row: Sequence[int], ends: Sequence[int], fill: int | None) -> int:
    """Count the ids of a response up to its end id, or without the fill behind it."""
    for index, token in enumerate(row):
        if token in ends:
            return index + 1
    n = len(row)
    while fill is not None and n and row[n - 1] == fill:
        n -= 1
    return n
