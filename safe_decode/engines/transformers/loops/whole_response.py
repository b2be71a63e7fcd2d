"""Responses judged when they are whole: beam search, assisted decoding, prompt lookup.

Knows decoding methods that reorder rows or propose several tokens at once, and how to pick
among beams. Does not know redirects, texts or traces.

These methods run as they are, with no session listening; then one forward over the finished
responses gives each of their tokens its one score, in order, and nothing is shown before. So a
row that does not trip is bare, whatever the cache does meanwhile. What it costs: one forward over
the whole batch, and a response that trips is written to its end before it is redirected. A
response that the model does not end itself is continued unseen, greedily, and judged with what
follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from safe_decode.activations.tap import unwatched
from safe_decode.engines.transformers.loops.extra_forwards import continued, whole_inputs
from safe_decode.engines.transformers.loops.padding import padded
from safe_decode.engines.transformers.loops.settings import (
    CallSettings,
    CriteriaList,
    PreparedSettings,
    ProcessorList,
    chooses_end,
    models_ends,
    reweighs,
    settings_of,
)
from safe_decode.errors import GuardError
from safe_decode.session.session import Session
from safe_decode.session.turns import RowEnd
from safe_decode.typing import CausalLM

__all__ = ["Method", "WholeResponseLoop", "method_of", "picked_beams", "pruned_beams"]

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


class WholeResponseLoop:
    """A decoding method for `model.generate(custom_generate=...)`; good for one call.

    Args:
        session: For the rows that the method returns.
        method: Which method runs.
        require: Called with the settings before the first forward; may raise.
        assistant: Keyword arguments of the method about its assistant.
        room: New tokens for which each row has positions in the model's context; None: no limit.

    Attributes:
        ends: How each row has ended; filled when the call has.
        fill_id: What stands behind a response that is shorter than its neighbours.
    """

    def __init__(
        self,
        session: Session,
        method: Method,
        *,
        require: Callable[[CallSettings], None] | None = None,
        assistant: Mapping[str, Any] | None = None,
        room: Sequence[int] | None = None,
    ) -> None:
        self.session = session
        self.settings: CallSettings | None = None
        self.ends: list[RowEnd] = []
        self.bare_steps: int | None = None
        self._room = room
        self._ahead: list[list[int]] = [[] for _ in range(session.batch)]
        self.generation: Any = None
        self.fill_id = 0
        self._method, self._require = method, require
        self._assistant = dict(assistant or {})

    def __call__(
        self,
        model: CausalLM,
        input_ids: Tensor,
        logits_processor: ProcessorList,
        stopping_criteria: CriteriaList,
        generation_config: PreparedSettings,
        inputs_tensor: Tensor | None = None,
        **model_kwargs: Any,  # noqa: ANN401 - what the forward takes
    ) -> object:
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
        with unwatched():
            self.generation = getattr(type(model), _METHODS[self._method])(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **given,
            )
        sequences: Tensor = getattr(self.generation, "sequences", self.generation)
        fill = self.fill_id if self._method == "beams" else None
        rows = [
            _Row.of(ids, settings.end_ids, fill)
            for ids in sequences[:, input_ids.shape[1] :].tolist()
        ]
        try:
            self._judge(model, sequences[:, : input_ids.shape[1]], rows, kept)
            self._end(model, rows, reweighs(logits_processor))
        except Exception as error:  # nothing may be released that was not judged
            from safe_decode.errors import as_guard_error

            self._fail(as_guard_error(error), rows)
        return self.generation

    def ahead(self, row: int, n: int) -> tuple[int, ...]:
        """Return the first `n` unseen ids behind a row's response."""
        return tuple(self._ahead[row][:n])

    def _judge(
        self,
        model: CausalLM,
        prompts: Tensor,
        rows: Sequence[_Row],
        kept: dict[str, Any],
    ) -> None:
        assert self.settings is not None
        mask = kept["attention_mask"]
        own_ends = models_ends(model) or frozenset(self.settings.end_ids)
        wanted = self._wanted()
        with unwatched():
            for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
                room = 2**40 if self._room is None else self._room[number] - len(row.content)
                n_ahead = min(wanted[number], max(0, room))
                # An end id that is none of the model's own is read on over like any token.
                first = [] if row.end is None or row.end in own_ends else [row.end][:n_ahead]
                n_ahead = 0 if row.end in own_ends else n_ahead - len(first)
                own = prompt if mask is None else prompt[mask[number].bool()]
                whole = torch.cat([own, own.new_tensor(row.content + first)])[None]
                ahead = continued(model, whole, n_ahead, own_ends)
                row.reaches_end = bool(ahead) and ahead[-1] in own_ends
                self._ahead[number] = first + (ahead[:-1] if row.reaches_end else ahead)
                self.session.close(number, len(row.content))
        answers = [row.content + own for row, own in zip(rows, self._ahead, strict=True)]
        sequences = padded(prompts, answers, self.fill_id)
        width, n_prompt = sequences.shape[1], prompts.shape[1]
        inputs = whole_inputs(model, sequences, kept, n_prompt)
        self.session.expect_whole(width - n_prompt)
        logits = model(**inputs, return_dict=True).logits
        for row, scores in zip(rows, logits, strict=True):
            last = scores[None, n_prompt + len(row.content) - 1]
            ends = torch.tensor([row.end or 0], device=last.device)
            row.is_own = row.end is None or bool(chooses_end(last.float(), ends))
        self.session.note(sequences, width - n_prompt)
        self.session.judge_whole(width, [len(answer) for answer in answers])

    def _wanted(self) -> list[int]:
        return [own.unseen_tokens for own in self.session.roster.policies]

    def _end(self, model: CausalLM, rows: Sequence[_Row], is_reweighed: bool) -> None:
        """Say how each row has ended, its whole response and what follows being judged."""
        assert self.settings is not None
        own_ends = models_ends(model) or frozenset(self.settings.end_ids)
        for number, (row, wanted) in enumerate(zip(rows, self._wanted(), strict=True)):
            is_own = row.end in own_ends and (row.is_own or not is_reweighed)
            is_own = is_own or row.reaches_end
            n, looked = len(row.content), len(self._ahead[number])
            withheld = 0 if is_own else min(n, max(0, wanted - looked))
            if number in self.session.trips:
                withheld = 0
            n_ids = n - withheld + (row.end is not None and not withheld)
            self.ends.append(RowEnd(n_ids, n, looked, withheld))

    def _fail(self, error: GuardError, rows: Sequence[_Row]) -> None:
        session = self.session
        for number, row in enumerate(rows):
            n = len(row.content)
            if session.roster.closes and session.roster.policies[number].protects:
                session.park(number, said=n, error=error)
            session.errors.setdefault(number, error)
        self.ends = [RowEnd(row.n_ids, len(row.content), 0, 0) for row in rows]


@dataclass
class _Row:
    """One finished response.

    Attributes:
        content: Its ids, without an end id.
        end: Its end id, or None.
        reaches_end: Whether the model ends its turn within what it says unseen.
        is_own: Whether its end is the model's own choice.
    """

    content: list[int]
    end: int | None
    reaches_end: bool = False
    is_own: bool = True

    @property
    def n_ids(self) -> int:
        return len(self.content) + (self.end is not None)

    @classmethod
    def of(cls, ids: list[int], ends: Sequence[int], fill: int | None) -> _Row:
        """Read it from what a method returns; `fill` stands behind shorter responses."""
        n = _length(ids, ends, fill)
        end = ids[n - 1] if n and ids[n - 1] in ends else None
        return cls(ids[: n - (end is not None)], end)


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


def _fill_of(config: PreparedSettings) -> int:
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


def picked_rows(
    session: Session, ends: Sequence[RowEnd], n: int, wanted: int
) -> tuple[list[int], list[int]]:
    """Pick the rows to return.

    Args:
        session: Of the rows.
        ends: How each row has ended.
        n: Rows that ran for one prompt, the best first.
        wanted: Rows of them that are returned.

    Returns:
        The rows, and how many beams of each prompt were left out for a trip.
    """
    rows, pruned = [], []
    for first in range(0, session.batch, n):
        tripped = [row in session.trips for row in range(first, first + n)]
        chosen = list(range(n))
        if n > wanted:
            chosen = picked_beams(tripped, [e.n_ids == 0 for e in ends[first : first + n]], wanted)
        rows += [first + i for i in chosen]
        pruned.append(pruned_beams(tripped, chosen))
    return rows, pruned
