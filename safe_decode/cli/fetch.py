"""`safe-decode fetch`: the real models that the catalogue names, brought to this machine.

Knows the option and how a catalogue is shown. Does not know sources.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Annotated

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json, working
from safe_decode.cli.options import JsonOptions
from safe_decode.cli.tables import WordTable, print_table

__all__ = ["fetch"]


@dataclass(frozen=True, kw_only=True)
class FetchOptions(JsonOptions):
    """Options of `safe-decode fetch`."""

    name: Annotated[
        str | None,
        typer.Argument(help="Name of a model. Without it: those that there are are listed."),
    ] = None


@command("Use a guarded model")
def fetch(options: FetchOptions) -> None:
    """Bring a real model that has a bundle to this machine, once; its sum is checked."""
    if options.name is None:
        _list(as_json=options.as_json)
        return
    # Bars of other libraries: the stages are told, and the time.
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    from safe_decode.cli.loading import silence_transformers
    from safe_decode.fetching.weights import fetch_model

    silence_transformers()
    out = console(stderr=True)
    with working(f"Fetching {options.name}"):
        folder = fetch_model(options.name, stage=lambda what: out.print(f"{what} ..."))
    if options.as_json:
        print_json({"name": options.name, "folder": str(folder)})
    else:
        console().print(f"{options.name} is in {folder}", soft_wrap=True)


def _list(*, as_json: bool) -> None:
    from safe_decode.catalogue import catalogue, model_folder

    rows = []
    for name, entry in sorted(catalogue().items()):
        is_here = entry.model is not None and model_folder(entry).is_dir()
        rows.append((name, entry.about, entry.licence, "yes" if is_here else "no"))
    columns = ("name", "about", "licence", "fetched")
    if as_json:
        print_json({"models": [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        print_table(WordTable(columns, rows, "Models with a bundle"))
