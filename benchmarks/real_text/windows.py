"""Mean activations of every channel over windows of a response, kept in shards.

A shard holds some rows; several workers may share a directory, each takes a shard that none
has taken, and a run that was stopped goes on. Content only: s_0, at which nothing has been said,
is left out.

Knows rows, forwards and files. Does not know labels or probes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.real_text.workplace import claim
from probes.activations.teacher_forcing import (
    EncodedResponse,
    PaddedBatch,
    encode_response,
    visit_activations,
)
from probes.data.conversations import Conversation
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site, SiteKind
from safe_decode.errors import DataError
from safe_decode.loading import Loaded
from safe_decode.whole_files import write_whole

__all__ = ["WINDOW", "WindowMeans", "cut", "every_site", "read_shards", "take_shards"]

WINDOW = 64
_KINDS: tuple[SiteKind, ...] = ("resid", "attn", "mlp")


class WindowMeans(NamedTuple):
    """Windows of some responses.

    Attributes:
        row: [n] which of the rows given.
        begin: [n] first content token of the window.
        tokens: [n] how many it has.
        values: [n, F] float16, the channels of `every_site` in order; may be memory-mapped.
    """

    row: NDArray[np.int64]
    begin: NDArray[np.int64]
    tokens: NDArray[np.int64]
    values: NDArray[np.float16]


def every_site(loaded: Loaded) -> list[Site]:
    """Name all channels of all layers: residual stream, inputs of o_proj and of down_proj."""
    anatomy = anatomy_of(loaded.model)
    return sorted(
        Site(layer, kind, tuple(range(anatomy.width(layer, kind))))
        for layer in range(len(anatomy.blocks))
        for kind in _KINDS
    )


def cut(loaded: Loaded, rows: Sequence[Conversation], tokens: int) -> list[EncodedResponse]:
    """Encode responses, at most so many content tokens of each."""
    encoded = [encode_response(loaded.tokenizer, row) for row in rows]
    return [one._replace(ids=one.ids[: one.turn_start + tokens]) for one in encoded]


def take_shards(
    directory: Path,
    loaded: Loaded,
    encoded: Sequence[EncodedResponse],
    *,
    rows_a_shard: int = 128,
    tokens_per_batch: int = 2048,
) -> None:
    """Compute each shard that is not finished and that no other worker is at."""
    directory.mkdir(parents=True, exist_ok=True)
    sites = every_site(loaded)
    for number, begin in enumerate(range(0, len(encoded), rows_a_shard)):
        finished = directory / f"{number:05d}.npy"
        if not claim(finished):
            continue
        part = encoded[begin : begin + rows_a_shard]
        index, values = _shard(loaded, sites, part, tokens_per_batch)
        index[:, 0] += begin
        write_whole(directory / f"{number:05d}.json", json.dumps(index.tolist()))
        temporary = directory / f"{number:05d}.part.npy"
        np.save(temporary, values)
        os.replace(temporary, finished)


def read_shards(directory: Path) -> list[WindowMeans]:
    """Open the shards that are finished, memory-mapped."""
    found = []
    for path in sorted(directory.glob("[0-9]*[0-9].npy")):
        index = np.asarray(json.loads(path.with_suffix(".json").read_text("utf-8")), np.int64)
        values = np.load(path, mmap_mode="r")
        found.append(WindowMeans(index[:, 0], index[:, 1], index[:, 2], values))
    return found


def _shard(
    loaded: Loaded, sites: list[Site], part: Sequence[EncodedResponse], tokens_per_batch: int
) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
    windows = [
        (row, begin, min(WINDOW, one.n_scores - 1 - begin))
        for row, one in enumerate(part)
        for begin in range(0, one.n_scores - 1, WINDOW)
        if begin == 0 or one.n_scores - 1 - begin >= WINDOW // 4
    ]
    count = Counter(row for row, _, _ in windows)
    first_of = {row: place for place, (row, begin, _) in enumerate(windows) if begin == 0}
    offsets = np.cumsum([0, *(len(site.channels) for site in sites)])
    values = np.empty((len(windows), offsets[-1]), np.float16)

    def visit(batch: PaddedBatch, site: int, found: Tensor) -> None:
        width, columns = found.shape[1], slice(offsets[site], offsets[site + 1])
        for index, row in enumerate(batch.rows):
            start = width - (batch.n_scores[index] - 1)
            for place in range(first_of[row], first_of[row] + count[row]):
                begin, n = windows[place][1], windows[place][2]
                own = found[index, start + begin : start + begin + n]
                values[place, columns] = own.mean(dim=0, dtype=torch.float32).half().numpy()

    visit_activations(
        loaded.model, sites, part, visit, description="reading", tokens_per_batch=tokens_per_batch
    )
    if not np.isfinite(values).all():
        raise DataError("an activation does not fit float16; keep float32.")
    return np.asarray(windows, np.int64), values
