"""Marked spans of reasoning in an open assistant turn, and thresholds of their own.

Inside a span a row's statistic is compared with the reasoning threshold, outside with the
answer's. Both are one comparison: inside, every value is lowered by the difference of the two,
so that the statistic stays one running maximum and state stays O(1) a row. The token that
completes an opening mark is inside, the one that completes a closing mark outside.

A turn has at most one span, at its beginning: where the template's header leaves one open, or
where the first ids of the turn are the opening mark and the model itself chose every one of
them. A mark anywhere else is text: in messages, tool results, raw prompts, a supplied prefill,
in the middle of an answer, or in what the guard says. So supplied text never raises a threshold;
a closing mark in it counts where it lowers one.

Knows ids of marks, ids of rows and two thresholds. Does not know scores, models or text. Each
certificate bounds its own share: of responses that alarm while reasoning, and of those that
alarm while answering. The share that alarms at all is at most their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_decode.certificate import Certificate
from safe_decode.certificate_choice import certificate_of
from safe_decode.errors import CertificateError, ConfigurationError, PromptError
from safe_decode.prompts.chat import assistant_header, text_ids
from safe_decode.typing import Tokenizer

__all__ = ["ReasoningSpans", "SpanMarks", "SpanReader", "OpenTurn"]


@dataclass(frozen=True)
class ReasoningSpans:
    """What a bundle knows of reasoning.

    Attributes:
        opens: Text of the opening mark, such as "<think>".
        closes: Text of the closing mark.
        certificates: For the largest statistic inside spans; one an alpha.

    Raises:
        ConfigurationError: A mark is empty, or both are the same.
        CertificateError: A certificate does not recompute, or there is none.
    """

    opens: str
    closes: str
    certificates: tuple[Certificate, ...]

    def __post_init__(self) -> None:
        if not self.opens or not self.closes or self.opens == self.closes:
            raise ConfigurationError(
                f"opens={self.opens!r} and closes={self.closes!r} must be two different marks."
            )
        if not self.certificates:
            raise CertificateError("the reasoning spans have no certificate; calibrate them.")
        for certificate in self.certificates:
            certificate.verify()

    def certificate(self, alpha: float, dtype: str | None = None) -> Certificate:
        """Return the certificate of a level.

        Args:
            alpha: The level.
            dtype: Number format of the model; None: any.

        Raises:
            CertificateError: This level is not certified; those that are, are named.
        """
        return certificate_of(self.certificates, alpha, "benign", dtype)

    def marks(self, tokenizer: Tokenizer) -> SpanMarks:
        """Encode the marks as the model writes them."""
        opens, closes = (_mark_ids(tokenizer, text) for text in (self.opens, self.closes))
        try:
            header = assistant_header(tokenizer)
        except PromptError:
            header = ()  # no template: no turn begins inside
        is_open = _last_end(header, opens) > _last_end(header, closes)
        return SpanMarks(opens, closes, header if is_open else ())


@dataclass(frozen=True)
class OpenTurn:
    """The open turn of one row: what of it the model did not choose.

    Attributes:
        start: Column of y_0.
        given: Leading ids of the turn that were supplied.
        is_open: Whether the template's header, which ends before `start`, leaves a span open.
        may_open: Whether the model itself writes the turn's beginning.
        shift: Reasoning threshold less the answer's.
    """

    start: int = 0
    given: int = 0
    is_open: bool = False
    may_open: bool = True
    shift: float = 0.0


@dataclass(frozen=True)
class SpanMarks:
    """Marks as ids.

    Attributes:
        opens: Of the opening mark.
        closes: Of the closing mark.
        header: The assistant's header, where the template leaves a span open in it; else empty.
    """

    opens: tuple[int, ...]
    closes: tuple[int, ...]
    header: tuple[int, ...] = ()

    def turn(self, prompt: Sequence[int], given: int, *, is_chat: bool, shift: float) -> OpenTurn:
        """Describe the turn that a prompt leaves open.

        Args:
            prompt: Its ids without padding.
            given: Trailing ids of it that are supplied prefill.
            is_chat: Whether there is an open turn; a raw completion has no place for marks.
            shift: Reasoning threshold less the answer's.
        """
        start = len(prompt) - given
        # Read from the row's own ids: a template may write another header for other messages.
        head = tuple(prompt[max(0, start - len(self.header)) : start])
        is_open = is_chat and bool(self.header) and head == self.header
        return OpenTurn(start, given, is_open, is_chat and not given, shift)

    def phases(self, ids: Sequence[int], turn: OpenTurn) -> list[bool]:
        """Say for the turn's beginning and after each of its ids whether it is inside."""
        found = [turn.is_open]
        self.extend(found, ids, turn)
        return found

    def extend(self, phases: list[bool], ids: Sequence[int], turn: OpenTurn) -> None:
        """Add to `phases`, in place, those of the turn's ids that have none yet."""
        while len(phases) <= len(ids):
            end = len(phases)
            if phases[-1]:
                begin = end - len(self.closes)
                is_mark = begin >= 0 and tuple(ids[begin:end]) == self.closes
                # Where the answer's threshold is the higher one, supplied ids do not lead to it.
                phases.append(not (is_mark and (turn.shift >= 0 or begin >= turn.given)))
            else:
                is_first = turn.may_open and end == len(self.opens)
                phases.append(is_first and tuple(ids[:end]) == self.opens)


class SpanReader:
    """Follows the rows of one generation.

    Args:
        marks: Of the tokenizer.
        turns: One a row, `start` counted in columns.
        device: Of the rows.
    """

    def __init__(self, marks: SpanMarks, turns: Sequence[OpenTurn], device: torch.device) -> None:
        self.marks, self.turns = marks, tuple(turns)
        shifts = [turn.shift for turn in self.turns]
        self._shifts = torch.tensor(shifts, dtype=torch.float32, device=device)
        self._ids: list[list[int]] = [[] for _ in self.turns]
        self._phases = [[turn.is_open] for turn in self.turns]

    def shift(self, ids: Tensor, n_columns: int) -> Tensor:
        """Read new columns and say by how much values are lowered.

        Args:
            ids: [batch, seq] everything so far, padding included; it only grows.
            n_columns: Trailing columns whose scores are judged.

        Returns:
            [batch, n_columns] float32.
        """
        width = ids.shape[1]
        for row, turn in enumerate(self.turns):
            read = self._ids[row]
            read += ids[row, turn.start + len(read) :].tolist()
            self.marks.extend(self._phases[row], read, turn)
        inside = [
            [self.inside(row, column) for column in range(width - n_columns, width)]
            for row in range(len(self.turns))
        ]
        return torch.tensor(inside, device=self._shifts.device) * self._shifts[:, None]

    def closing(self, row: int) -> tuple[int, ...]:
        """Return the closing mark if a row's newest token lies inside a span, else nothing."""
        return self.marks.closes if self._phases[row][-1] else ()

    def inside(self, row: int, column: int) -> bool:
        """Say whether the score read at a column lies inside a span."""
        return self._phases[row][max(0, column + 1 - self.turns[row].start)]


def _mark_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """A mark that is a token of its own, special or added, or the ids of its text."""
    own = tokenizer.get_added_vocab().get(text)
    return (int(own),) if own is not None else text_ids(tokenizer, text)


def _last_end(ids: Sequence[int], mark: tuple[int, ...]) -> int:
    """Return where the last of a mark ends in ids; -1 where there is none."""
    ends = range(len(ids), len(mark) - 1, -1)
    return next((end for end in ends if tuple(ids[end - len(mark) : end]) == mark), -1)
