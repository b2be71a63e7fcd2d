"""Read window means of the rows that are fitted on: `python -m benchmarks.real_text.harvest`.

Start it once a core; the workers share the shards.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.real_text.rows import StudyRow, study_rows
from benchmarks.real_text.windows import cut, take_shards
from safe_decode.loading import load_model

__all__ = ["fitted_rows", "main"]

TOKENS = 192


def fitted_rows(data: Path) -> list[StudyRow]:
    """Keep what probes are fitted on or chosen by; sources with two labels come first."""
    kept = [row for row in study_rows(data) if row.part in ("fit", "select")]
    last = ("alpaca-52k", "safety-tuned-llamas", "refusal-direction", "safe-unlearning")
    kept = [row for row in kept if row.conversation.response.strip()]
    return sorted(kept, key=lambda row: (row.source in last, row.group))


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the shards that nobody has taken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    loaded = load_model(arguments.model)
    rows = fitted_rows(arguments.data)
    encoded = cut(loaded, [row.conversation for row in rows], TOKENS)
    take_shards(arguments.work / "windows", loaded, encoded)


if __name__ == "__main__":
    main()
