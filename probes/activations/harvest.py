"""Harvest activations of whole responses, in memory or to memory-mapped shards.

Shards are written whole and renamed into place, and a harvest that was interrupted goes
on where it stopped: a shard that is there is not computed again.

Knows storage. Where positions lie is known to `teacher_forcing`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.activations.features import ResponseFeatures
from probes.activations.teacher_forcing import (
    TOKENS_PER_BATCH,
    EncodedResponse,
    encode_response,
    onset_token,
    teacher_forced,
)
from probes.data.conversations import Conversation
from probes.runs.identity import weights_digest
from safe_decode.activations.site import Site, n_features, sorted_sites
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.probe.interface import Probe
from safe_decode.typing import CausalLM, Tokenizer
from safe_decode.whole_files import write_whole

__all__ = ["harvest", "harvest_to", "score_responses"]

Storage = Literal["float32", "float16"]
_SHARD = "features-"
_HALF_SHARD = re.compile(rf"{_SHARD}\d{{5}}\.\d+\.part")


def harvest(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    sites: Sequence[Site],
    *,
    storage: Storage = "float32",
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> ResponseFeatures:
    """Read the activations of every response into memory.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        conversations: With responses; generated ids are used where present.
        sites: Where to read.
        storage: float16 halves the memory; values beyond 65,504 are refused.
        tokens_per_batch: Padded tokens run at once.

    Raises:
        DataError: A value does not fit float16, or an onset lies beyond its response.
    """
    encoded = [encode_response(tokenizer, row) for row in conversations]
    onsets = _onsets(tokenizer, conversations, encoded)
    arrays = [
        np.empty((row.n_scores, n_features(sites)), dtype=np.dtype(storage)) for row in encoded
    ]
    _fill(arrays, model, sites, encoded, tokens_per_batch)
    return ResponseFeatures(sorted_sites(sites), tuple(arrays), onsets)


def harvest_to(
    directory: str | os.PathLike[str],
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    sites: Sequence[Site],
    *,
    storage: Storage = "float16",
    responses_per_shard: int = 512,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> ResponseFeatures:
    """Read the activations of every response into shards, and return them memory-mapped.

    Memory is bounded by a batch. Called again with the same responses and sites, only
    shards that are missing are computed. One harvest at a time writes to a directory.

    Raises:
        DataError: As in `harvest`; or the directory holds another harvest.
        ConfigurationError: The disk has no room for what is still missing.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    encoded = [encode_response(tokenizer, row) for row in conversations]
    onsets = _onsets(tokenizer, conversations, encoded)
    identity = _identity(encoded, sites, storage, responses_per_shard)
    _require_disk(root, encoded, sites, storage)
    _claim(root, {**identity, "weights_sha256": weights_digest(model)})
    for left in root.iterdir():
        if _HALF_SHARD.fullmatch(left.name):  # of a run that was killed
            left.unlink()
    responses: list[NDArray[Any]] = []
    for number, begin in enumerate(range(0, len(encoded), responses_per_shard)):
        part = encoded[begin : begin + responses_per_shard]
        path = root / f"{_SHARD}{number:05d}.npy"
        if not path.exists():
            _write_shard(path, model, sites, part, storage, tokens_per_batch)
        responses += _views(np.load(path, mmap_mode="r"), part)
    return ResponseFeatures(sorted_sites(sites), tuple(responses), onsets)


def score_responses(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    probe: Probe,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    on_batch: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Score responses without storing activations.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        conversations: With responses.
        probe: On the model's device.
        tokens_per_batch: Padded tokens run at once.
        on_batch: Told how many responses are done, after each batch.

    Returns:
        [T + 1, K] float32 logits on the CPU, one tensor a response.
    """
    encoded = [encode_response(tokenizer, row) for row in conversations]
    logits: list[Tensor] = [torch.empty(0)] * len(encoded)
    batches = teacher_forced(
        model, probe.sites, encoded, description="scoring", tokens_per_batch=tokens_per_batch
    )
    for batch in batches:
        scored = batch._replace(features=probe(batch.features).cpu())
        for index, row in enumerate(batch.rows):
            logits[row] = scored.of(index).clone()
        if on_batch is not None:
            on_batch(len(batch.rows))
    return logits


def _fill(
    arrays: Sequence[NDArray[Any]],
    model: CausalLM,
    sites: Sequence[Site],
    encoded: Sequence[EncodedResponse],
    tokens_per_batch: int,
) -> None:
    batches = teacher_forced(
        model, sites, encoded, description="harvesting", tokens_per_batch=tokens_per_batch
    )
    for batch in batches:
        on_cpu = batch._replace(features=batch.features.cpu())
        for index, row in enumerate(batch.rows):
            values = on_cpu.of(index)
            if arrays[row].dtype == np.float16:
                _require_fits_half(values)
            # Converts and stores in one pass; NumPy's own conversion is several times slower.
            torch.from_numpy(arrays[row]).copy_(values)


def _write_shard(
    path: Path,
    model: CausalLM,
    sites: Sequence[Site],
    part: Sequence[EncodedResponse],
    storage: Storage,
    tokens_per_batch: int,
) -> None:
    shape = (sum(row.n_scores for row in part), n_features(sites))
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        shard = np.lib.format.open_memmap(temporary, mode="w+", dtype=storage, shape=shape)
        _fill(_views(shard, part), model, sites, part, tokens_per_batch)
        shard.flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _views(shard: NDArray[Any], part: Sequence[EncodedResponse]) -> list[NDArray[Any]]:
    stops = np.cumsum([row.n_scores for row in part])
    if len(shard) != stops[-1]:
        raise DataError(
            f"a shard has {len(shard)} positions, wanted {stops[-1]}; delete it and harvest again."
        )
    return np.split(shard, stops[:-1])


def _require_disk(
    root: Path, encoded: Sequence[EncodedResponse], sites: Sequence[Site], storage: Storage
) -> None:
    """Refuse, before the first forward, a harvest that would fill the disk."""
    positions = sum(row.n_scores for row in encoded)
    wanted = positions * n_features(sites) * np.dtype(storage).itemsize
    there = sum(path.stat().st_size for path in root.glob(f"{_SHARD}*.npy"))
    free = shutil.disk_usage(root).free
    if wanted - there > free:
        raise ConfigurationError(
            f"{root} has room for {free / 2**30:.2f} GiB, and {positions:,} positions of "
            f"{n_features(sites):,} features in {storage} need {(wanted - there) / 2**30:.2f} GiB "
            "more; read fewer features or responses, or pass a directory on a larger disk."
        )


def _claim(root: Path, identity: dict[str, Any]) -> None:
    path = root / "harvest.json"
    text = json.dumps(identity, sort_keys=True)
    if not path.exists():
        if any(root.glob(f"{_SHARD}*.npy")):
            raise DataError(
                f"{root} holds shards but no {path.name} that says of what; use a new directory."
            )
        write_whole(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise DataError(
            f"{root} holds a harvest of another model, or of other responses, sites or storage; "
            "use a new directory."
        )


def _identity(
    encoded: Sequence[EncodedResponse], sites: Sequence[Site], storage: str, per_shard: int
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(np.asarray([len(row.ids), row.turn_start, *row.ids], np.int64).tobytes())
    return {
        "ids_sha256": digest.hexdigest(),
        "responses_per_shard": per_shard,
        "sites": [asdict(site) for site in sorted_sites(sites)],
        "storage": storage,
    }


def _onsets(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    encoded: Sequence[EncodedResponse],
) -> tuple[int | None, ...]:
    pairs = zip(conversations, encoded, strict=True)
    return tuple(onset_token(tokenizer, row, ids) for row, ids in pairs)


def _require_fits_half(features: Tensor) -> None:
    low, high = torch.aminmax(features)
    largest = max(-float(low), float(high))
    if largest > float(np.finfo(np.float16).max):
        raise DataError(f"an activation of {largest:.3g} does not fit float16; store float32.")
