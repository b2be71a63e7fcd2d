"""Rows that leave, join and move between two tokens, as continuous batching has them.

Knows places in a batch. Does not know scores or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from safe_decode.errors import ConfigurationError
from safe_decode.session.records import SessionRow

__all__ = ["BatchUpdate", "JoiningRow", "Rearrangement"]

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class JoiningRow:
    """A row that joins a running session.

    Attributes:
        row: What holds for it.
        prompt_features: [scanned, F] of the last positions of its prompt.
    """

    row: SessionRow
    prompt_features: Tensor


@dataclass(frozen=True)
class BatchUpdate:
    """What changes between two tokens; carried out in the order of the attributes.

    The same three steps as vLLM's `BatchUpdate`. In the end the places 0 to n - 1 are taken.

    Attributes:
        removed: Places whose rows leave.
        added: Rows that join, by their place, which is empty by then.
        moved: Pairs (from, to); if a row stands at `to`, the two change places.
    """

    removed: Sequence[int] = ()
    added: Mapping[int, JoiningRow] = field(default_factory=dict)
    moved: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Rearrangement:
    """Where the rows of a batch come from.

    Attributes:
        sources: For each place, the place its row had before; None: it joins.
        joining: Rows that join, by place.
    """

    sources: tuple[int | None, ...]
    joining: Mapping[int, JoiningRow]

    @classmethod
    def of(cls, batch: int, change: BatchUpdate) -> Rearrangement:
        """Carry out a change on the places of `batch` rows.

        Raises:
            ConfigurationError: A place that is empty, taken twice or left out, no row that is
                left, or a prompt with other features than `scanned` says.
        """
        places: dict[int, int | JoiningRow] = {place: place for place in range(batch)}
        for place in change.removed:
            if places.pop(place, None) is None:
                raise ConfigurationError(
                    f"removed={list(change.removed)} names place {place}, where no row stands; "
                    f"the session has {batch} rows."
                )
        for place, joining in change.added.items():
            if place in places:
                raise ConfigurationError(
                    f"added names place {place}, where a row stands; remove that row first, or "
                    f"use place {max(places) + 1}."
                )
            n_features = len(joining.prompt_features)
            if n_features != joining.row.scanned:
                raise ConfigurationError(
                    f"prompt_features of place {place} has {n_features} positions, wanted "
                    f"scanned={joining.row.scanned} of them."
                )
            places[place] = joining
        for source, target in change.moved:
            if source not in places:
                raise ConfigurationError(
                    f"moved=({source}, {target}) names place {source}, where no row stands."
                )
            row = places.pop(source)
            if target in places:
                places[source] = places[target]
            places[target] = row
        if not places or sorted(places) != list(range(len(places))):
            raise ConfigurationError(
                f"the change leaves rows in the places {sorted(places)}, wanted 0 to n - 1 "
                "without a gap, and at least one row; move the last rows into the gaps."
            )
        rows = [places[place] for place in range(len(places))]
        return cls(
            tuple(row if isinstance(row, int) else None for row in rows),
            {i: row for i, row in enumerate(rows) if isinstance(row, JoiningRow)},
        )

    def kept(self, values: Mapping[int, _Value]) -> dict[int, _Value]:
        """Carry what is known by place over to the new places."""
        return {
            place: values[source]
            for place, source in enumerate(self.sources)
            if source is not None and source in values
        }
