"""Options that several commands of the workbench share, each written once.

Knows their names, types, defaults and help, and how the data they name is read. Does not know
what any command does with the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.cli.console import working
from safe_decode.errors import ConfigurationError
from safe_decode.loading import Loaded

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.data.reader import Reading

__all__ = [
    "BatchSize",
    "DataOptions",
    "Fold",
    "JournalPath",
    "RefusalPhrases",
    "SplitOptions",
    "read",
    "require_different_samples",
    "whole",
]

RefusalPhrases = Annotated[
    list[str] | None,
    typer.Option(
        help="Phrase that opens a refusal, besides the built-in ones. May be given several times."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Responses that are generated together.")]
JournalPath = Annotated[
    Path | None,
    typer.Option(
        help="Write each finished part to this JSON lines file. A run that was interrupted goes on "
        "from it."
    ),
]
Fold = Annotated[
    int,
    typer.Option(
        min=0, max=2, help="Which of three groups of categories is held out of the embedded world."
    ),
]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which conversations are read, and how."""

    data: Annotated[
        list[str],
        typer.Option(
            help="Conversations: a JSONL, JSON, CSV or Parquet file, or hf:NAME[:split]. May be "
            "given several times."
        ),
    ]
    columns: Annotated[
        str,
        typer.Option(
            help="What the columns mean: auto, the name of a public set, or pairs of field=column."
        ),
    ] = "auto"
    strict: Annotated[
        bool,
        typer.Option(help="Stop at the first row that cannot be used, instead of counting it."),
    ] = False

    def read(self) -> list[Reading]:
        """Read all sources."""
        return read(self.data, self.columns, strict=self.strict)


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How conversations are divided into splits."""

    balance: Annotated[
        bool,
        typer.Option(
            help="Drop rows of fit and test until each of the four cells of harmful or benign "
            "request and harmful or harmless response holds 15 %."
        ),
    ] = False
    seed: Annotated[int, typer.Option(help="Seed of the splits and draws.")] = 0


def read(data: Sequence[str], columns: str, *, strict: bool) -> list[Reading]:
    """Read all sources."""
    from probes.data.reader import read_conversations

    with working("Reading"):
        return [read_conversations(source, columns=columns, strict=strict) for source in data]


def whole(own: Loaded, rows: Sequence[Conversation]) -> tuple[list[Conversation], int]:
    """Keep the conversations that fit the model's context, and count the others."""
    from probes.activations.teacher_forcing import within_context

    with working("Encoding"):
        kept = within_context(own.model, own.tokenizer, rows)
    return kept, len(rows) - len(kept)


def require_different_samples(samples: int, temperature: float) -> None:
    """Refuse, before any work, several samples of one prompt that could only be the same text.

    Raises:
        ConfigurationError: More than one sample at temperature 0.
    """
    if samples > 1 and temperature == 0:
        raise ConfigurationError(
            f"--samples={samples} without --temperature would be {samples} times the same text; "
            "pass a temperature above 0."
        )
