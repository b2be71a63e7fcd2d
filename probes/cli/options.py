"""What the commands of the workbench share: reading data, loading the model, telling people.

Knows options that several commands have. Does not know what any of them does with the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.cli.console import console, working
from safe_decode.loading import Dtype, Loaded

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.data.reader import Reading

__all__ = [
    "Balance",
    "Columns",
    "Data",
    "Seed",
    "Strict",
    "loaded",
    "read",
    "show_facts",
    "show_warnings",
    "whole",
]

Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        help="JSONL, JSON, CSV or Parquet, or hf:NAME[:split]; may be given several times.",
    ),
]
Columns = Annotated[
    str,
    typer.Option(
        help="What the columns mean: auto, the name of a public set, or pairs of field=column."
    ),
]
Strict = Annotated[bool, typer.Option(help="Stop at the first bad row, rather than count it.")]
Seed = Annotated[int, typer.Option(help="Seed of splits and draws.")]
Balance = Annotated[
    bool,
    typer.Option(
        help="Drop rows of fit and test until each of the four cells of harmful or benign "
        "request and harmful or harmless response holds 15 %."
    ),
]


def read(data: Sequence[str], columns: str, *, strict: bool) -> list[Reading]:
    """Read all sources."""
    from probes.data.reader import read_conversations

    with working("Reading"):
        return [read_conversations(source, columns=columns, strict=strict) for source in data]


def loaded(model: str | None, device: str, dtype: Dtype) -> Loaded:
    """Load the model a bundle is made for; the embedded aligned one if none is named."""
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.loading import load_model

    with working("Loading the model"):
        from transformers.utils import logging

        # Standard error is kept for our own progress, and for errors of one line.
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        return load_model(model or artefact("aligned"), device=device, dtype=dtype)


def whole(own: Loaded, rows: Sequence[Conversation]) -> tuple[list[Conversation], int]:
    """Keep the conversations that fit the model's context, and count the others."""
    from probes.activations.teacher_forcing import within_context

    with working("Encoding"):
        kept = within_context(own.model, own.tokenizer, rows)
    return kept, len(rows) - len(kept)


def show_facts(title: str, facts: Mapping[str, object], wrote: Path | None = None) -> None:
    """Print a table of names and values."""
    from rich.table import Table

    table = Table("", "", title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _shown(value))
    console().print(table)
    if wrote is not None:
        console().print(f"wrote {wrote}", soft_wrap=True)


def show_warnings(readings: Sequence[Reading], warnings: Sequence[str] = ()) -> None:
    """Tell on standard error what was left out and what is short."""
    screen = console(stderr=True)
    for reading in readings:
        if reading.bad:
            screen.print(
                f"{reading.source}: {reading.bad} of {reading.rows} rows cannot be used",
                soft_wrap=True,
            )
        for line in reading.named:
            screen.print(f"  {line}", soft_wrap=True)
    for line in warnings:
        screen.print(f"warning: {line}", soft_wrap=True)


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value) or "–"
    return str(value)
