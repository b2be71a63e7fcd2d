"""Read window means of the rows that are fitted on: `python -m benchmarks.real_text.harvest`.

Start it once a core; the workers share the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_text.parts import StudyRow, study_rows
from benchmarks.real_text.windows import cut, take_shards
from benchmarks.real_text.workplace import parser_of
from safe_decode.loading import Loaded, load_model

__all__ = ["LAYERS", "fitted_rows", "load_shallow", "main"]

TOKENS = 128
LAYERS = 20
"""Blocks that are run: the last ones hold the next token, and cost as much as the others."""


def fitted_rows(data: Path) -> list[StudyRow]:
    """List what probes are fitted on or chosen by."""
    rows = [row for row in study_rows(data) if row.part in ("fit", "select")]
    rows = [row for row in rows if row.conversation.response.strip()]
    # Mixes the sources, so that the first shards are like all.
    return sorted(rows, key=lambda row: row.group[::-1])


def load_shallow(name: str) -> Loaded:
    """Load a model and leave out its last blocks; the others compute what they did."""
    loaded = load_model(name)
    model: Any = loaded.model
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    return loaded


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the shards that nobody has taken."""
    arguments = parser_of(__doc__, has_model=True).parse_args(argv)
    torch.set_num_threads(1)
    loaded = load_shallow(arguments.model)
    rows = fitted_rows(arguments.data)
    encoded = cut(loaded, [row.conversation for row in rows], TOKENS)
    take_shards(arguments.work / "windows", loaded, encoded)


if __name__ == "__main__":
    main()
