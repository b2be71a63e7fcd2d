"""Marked spans of reasoning in an open assistant turn, and thresholds of their own.

Inside a span a row's statistic is compared with the reasoning threshold, outside with the
answer's. Both are one comparison: inside, every value is lowered by the difference of the two,
so that the statistic stays one running maximum and state stays O(1) a row. The token that
completes an opening mark is inside, the one that completes a closing mark outside.

Knows ids of marks, ids of rows and two thresholds. Does not know scores, models or text. Each
certificate bounds its own share: of responses that alarm while reasoning, and of those that
alarm while answering. The share that alarms at all is at most their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safe_decode.certificate import Certificate, certificate_of
from safe_decode.chat import assistant_header, text_ids
from safe_decode.errors import CertificateError, ConfigurationError, PromptError

__all__ = ["ReasoningSpans", "SpanMarks", "SpanReader"]


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

    def certificate(self, alpha: float) -> Certificate:
        """Return the certificate of a level.

        Raises:
            CertificateError: This level is not certified; those that are, are named.
        """
        return certificate_of(self.certificates, alpha, "benign")

    def marks(self, tokenizer: Any) -> SpanMarks:  # noqa: ANN401 - duck-typed
        """Encode the marks as the model writes them."""
        opens, closes = (_mark_ids(tokenizer, text) for text in (self.opens, self.closes))
        try:
            header: tuple[int, ...] = assistant_header(tokenizer)
        except PromptError:
            header = ()  # no template: turns begin outside
        plain = SpanMarks(opens, closes, starts_inside=False)
        return SpanMarks(opens, closes, starts_inside=plain.phases(header)[-1])


@dataclass(frozen=True)
class SpanMarks:
    """Marks as ids.

    Attributes:
        opens: Of the opening mark.
        closes: Of the closing mark.
        starts_inside: Whether the template's header leaves a span open.
    """

    opens: tuple[int, ...]
    closes: tuple[int, ...]
    starts_inside: bool = False

    def phases(self, ids: Sequence[int]) -> list[bool]:
        """Say for the turn's beginning and after each of its ids whether it is inside."""
        found = [self.starts_inside]
        self.extend(found, ids)
        return found

    def extend(self, phases: list[bool], ids: Sequence[int]) -> None:
        """Add to `phases`, in place, those of the ids that have none yet."""
        while len(phases) <= len(ids):
            end, inside = len(phases), phases[-1]
            mark = self.closes if inside else self.opens
            phases.append(inside != (tuple(ids[max(0, end - len(mark)) : end]) == mark))


class SpanReader:
    """Follows the rows of one generation.

    Args:
        marks: Of the tokenizer.
        starts: [batch] column of each row's first turn token y_0.
        shifts: [batch] reasoning threshold less the answer's.
        device: Of the rows.
    """

    def __init__(
        self,
        marks: SpanMarks,
        *,
        starts: Sequence[int],
        shifts: Sequence[float],
        device: torch.device,
    ) -> None:
        self.marks, self.starts = marks, tuple(starts)
        self._shifts = torch.tensor(shifts, dtype=torch.float32, device=device)
        self._turns: list[list[int]] = [[] for _ in self.starts]
        self._phases = [[marks.starts_inside] for _ in self.starts]

    def shift(self, ids: Tensor, n_columns: int) -> Tensor:
        """Read new columns and say by how much values are lowered.

        Args:
            ids: [batch, seq] everything so far, padding included; it only grows.
            n_columns: Trailing columns whose scores are judged.

        Returns:
            [batch, n_columns] float32.
        """
        width = ids.shape[1]
        for row, start in enumerate(self.starts):
            turn = self._turns[row]
            turn += ids[row, start + len(turn) :].tolist()
            self.marks.extend(self._phases[row], turn)
        inside = [
            [self.inside(row, column) for column in range(width - n_columns, width)]
            for row in range(len(self.starts))
        ]
        return torch.tensor(inside, device=self._shifts.device) * self._shifts[:, None]

    def closing(self, row: int) -> tuple[int, ...]:
        """Return the closing mark if a row's newest token lies inside a span, else nothing."""
        return self.marks.closes if self._phases[row][-1] else ()

    def inside(self, row: int, column: int) -> bool:
        """Say whether the score read at a column lies inside a span."""
        return self._phases[row][max(0, column + 1 - self.starts[row])]


def _mark_ids(tokenizer: Any, text: str) -> tuple[int, ...]:  # noqa: ANN401
    """A mark that is a token of its own, special or added, or the ids of its text."""
    own = tokenizer.get_added_vocab().get(text)
    return (int(own),) if own is not None else text_ids(tokenizer, text)
