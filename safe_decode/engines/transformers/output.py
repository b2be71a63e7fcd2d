"""What a guarded call hands back: sequences, texts, traces, and the recorded steps.

Knows ids that stand, padding, and the output object of `generate`. Does not know sessions,
loops or how a row came to what it says.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from safe_decode.engines.transformers.loops.settings import CallSettings
from safe_decode.policy.redirect import REDIRECTS
from safe_decode.streaming.events import FinishReason
from safe_decode.streaming.release import RowRelease
from safe_decode.trace.schema import SafetyTrace
from safe_decode.trace.shown import Decode
from safe_decode.trace.writer import FinishedRow

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput

__all__ = ["GuardedOutput", "Standing", "finish_reason", "matched_generation", "standing_of"]


_Index: TypeAlias = "int | slice | Tensor"
_Recorded: TypeAlias = "Tensor | tuple[_Recorded, ...]"
"""Of one step: a tensor, or one a layer."""
_DRAWN = 8
"""Rows that a notebook shows of one output."""
_RECORDED = ("scores", "logits", "attentions", "hidden_states")


@dataclass
class GuardedOutput:
    """What a guarded call returns.

    Indexed, iterated over or measured it is its `sequences`, as what `model.generate` returns, so
    that pipelines and code written for models take it as it is.

    Attributes:
        sequences: [batch, seq] ids: the user's prompt ids, then what stands of the answer,
            right-padded. Rows that did not trip are as bare `generate` returns them.
        texts: What the reader gets: the released answer and its refusal, without the prompt
            and without a supplied prefill.
        traces: What happened in each row, and why; written when first read.
        generation: With `return_dict_in_generate`, the output object of `generate`, its
            sequences those above. Its recorded steps are those of the tokens that stand: in
            a row that tripped, from the cut on, scores are 0 at the id that stands and -inf
            elsewhere, as if forced, and logits, attentions and hidden states are NaN. A
            refusal longer than the recorded steps has none. Of beams, `beam_indices` are -1
            from the cut on instead. Its `past_key_values` are None if a row has tripped.
            Else None.
        decode: The tokenizer's, for showing tokens in notebooks; None: as ids.
    """

    sequences: Tensor
    texts: list[str]
    traces: Sequence[SafetyTrace]
    generation: Any = None
    decode: Decode | None = field(default=None, repr=False, compare=False)

    @property
    def shape(self) -> torch.Size:
        """Of `sequences`, [batch, seq]."""
        return self.sequences.shape

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.sequences)

    def __getitem__(self, index: _Index | tuple[_Index, ...]) -> Tensor:
        return self.sequences[index]

    def reshape(self, *shape: int) -> Tensor:
        """Reshape `sequences`, as pipelines do."""
        return self.sequences.reshape(*shape)

    def tolist(self) -> list[list[int]]:
        """Return `sequences` as lists of ids."""
        found: list[list[int]] = self.sequences.tolist()
        return found

    def __repr__(self) -> str:
        """Return one line without any text: outcomes and sizes."""
        outcomes = Counter(trace.end.outcome for trace in self.traces)
        told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        return f"GuardedOutput({told}; sequences {list(self.shape)}, texts, traces)"

    def _repr_html_(self) -> str:
        """Draw the rows for a notebook: tokens by risk, the trip, and what the reader gets."""
        from safe_decode.trace.notebook import trace_as_html

        rows = list(zip(self.traces, self.texts, strict=True))
        drawn = [trace_as_html(one, decode=self.decode, text=text) for one, text in rows[:_DRAWN]]
        more = f"<p>… and {len(rows) - _DRAWN:,} rows more</p>" if len(rows) > _DRAWN else ""
        return "<hr>".join(drawn) + more


@dataclass(frozen=True)
class Standing:
    """What stands of one row.

    Attributes:
        row: Its index in the batch that `generate` ran.
        ids: Ids behind the prompt.
        own: How many of them the row's own run said and kept; None: all, it did not trip.
    """

    row: int
    ids: tuple[int, ...]
    own: int | None


def matched_generation(
    generation: ModelOutput,
    sequences: Tensor,
    rows: Sequence[Standing],
    n_steps: int | None = None,
) -> ModelOutput:
    """Make the recorded steps those of the tokens that stand, see `GuardedOutput`.

    Args:
        generation: Output object of `generate`; not changed.
        sequences: What stands.
        rows: Each row.
        n_steps: Steps after which bare `generate` ends; later ones were unseen. None: all.
    """
    matched = copy.copy(generation)
    matched.sequences = sequences
    for name in _RECORDED if n_steps is not None else ():
        if matched.get(name) is not None:
            matched[name] = matched[name][:n_steps]
    if generation.get("beam_indices") is not None:
        _match_beams(matched, generation, rows)
    cut = [standing for standing in rows if standing.own is not None]
    if not cut:
        return matched
    for name in _RECORDED:
        recorded = matched.get(name)
        if recorded is not None and generation.get("beam_indices") is None:
            matched[name] = tuple(
                _step(value, step, cut, is_scores=name == "scores")
                for step, value in enumerate(recorded)
            )
    if generation.get("past_key_values") is not None:
        matched["past_key_values"] = None
    return matched


def _match_beams(matched: ModelOutput, generation: ModelOutput, rows: Sequence[Standing]) -> None:
    picked = [standing.row for standing in rows]
    matched["beam_indices"] = generation["beam_indices"][picked]
    if generation.get("sequences_scores") is not None:
        matched["sequences_scores"] = generation["sequences_scores"][picked]
    for index, standing in enumerate(rows):
        if standing.own is not None:
            matched["beam_indices"][index, standing.own :] = -1
            if matched.get("sequences_scores") is not None:
                matched["sequences_scores"][index] = torch.nan


def _step(value: _Recorded, step: int, rows: Sequence[Standing], *, is_scores: bool) -> _Recorded:
    if isinstance(value, tuple):  # one a layer
        return tuple(_step(layer, step, rows, is_scores=is_scores) for layer in value)
    late = [row for row in rows if row.own is not None and step >= row.own]
    if not late:
        return value
    value = value.clone()
    for standing in late:
        value[standing.row] = -torch.inf if is_scores else torch.nan
        if is_scores and step < len(standing.ids):
            value[standing.row, standing.ids[step]] = 0.0
    return value


def standing_of(row: int, outcome: FinishedRow) -> Standing:
    """Say what stands of a finished row."""
    trip = outcome.record.trip
    return Standing(row, outcome.ids, None if trip is None else trip.cut.kept)


def finish_reason(outcome: FinishedRow, reader: RowRelease, settings: CallSettings) -> FinishReason:
    """Say why a row has ended, in the words of the field."""
    redirected = outcome.redirected
    if outcome.cancelled_after is not None:
        return "cancelled"
    has_resumed = redirected is not None and REDIRECTS[redirected.how].resumes
    if outcome.record.trip is not None and not has_resumed:
        return "content_filter"
    if reader.withheld_tokens:
        return "length"
    if reader.end_id is not None or reader.stop_string is not None:
        return "stop"
    return "length" if len(outcome.ids) >= settings.max_new_tokens else "stop"
