"""How far a streaming pass has come, on disk, so that one that was ended goes on.

Responses are run in a fixed order, in parts; after each part the moments and the number of
responses done are written to a temporary name and renamed. Another model, other responses
or another part size is another pass, and its file is refused rather than mixed in.

Knows moments, counts and digests. Does not know hooks or what is measured.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probes.activations.teacher_forcing import EncodedResponse
from probes.location.importance import RunningMoments
from safe_decode.errors import DataError
from safe_decode.typing import CausalLM

__all__ = ["StreamKept"]

_PART = 64  # responses: seconds on a small model, and a part is all that is lost
_SAMPLED_PER_PARAMETER = 64


@dataclass
class StreamKept:
    """Moments of one pass and how many of its responses they hold.

    Attributes:
        moments: One for each site; they grow as parts are run.
        done: Responses that `moments` holds.
        identity: Digest of the model's sampled weights and of the token ids.
        path: Where it is kept; None keeps nothing, and the pass is one part.
    """

    moments: tuple[RunningMoments, ...]
    done: int
    identity: str
    path: Path | None

    @classmethod
    def of(
        cls,
        model: CausalLM,
        encoded: Sequence[EncodedResponse],
        *,
        widths: Sequence[int],
        path: str | os.PathLike[str] | None,
    ) -> StreamKept:
        """Begin a pass, or go on with the one at `path`.

        Raises:
            DataError: `path` holds another pass or cannot be read.
        """
        if path is None:
            return cls(_fresh(widths), 0, "", None)
        identity, file = _identity(model, encoded), Path(path)
        if not file.exists():
            return cls(_fresh(widths), 0, identity, file)
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except (OSError, ValueError) as error:
            raise DataError(
                f"{file} cannot be read as kept moments: {error}; delete it."
            ) from error
        if str(arrays.get("identity")) != identity:
            raise DataError(
                f"{file} was kept by a pass over another model or other responses; pass another "
                "directory, or delete it."
            )
        return cls(_resumed(arrays, widths), int(arrays["done"]), identity, file)

    def to_do(self, encoded: Sequence[EncodedResponse]) -> Iterator[Sequence[EncodedResponse]]:
        """Yield the parts that are not yet in the moments, responses of like length together."""
        if self.path is None:
            yield encoded
            return
        ordered = sorted(encoded, key=lambda row: len(row.ids))
        for begin in range(self.done, len(ordered), _PART):
            yield ordered[begin : begin + _PART]

    def keep(self, responses: int) -> None:
        """Count a part as done, and write."""
        self.done += responses
        if self.path is None:
            return
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part.npz")
        try:
            states = [moments.state() for moments in self.moments]
            arrays: dict[str, Any] = {
                name: np.concatenate([np.atleast_1d(state[name]) for state in states])
                for name in states[0]
            }
            np.savez(part, done=self.done, identity=self.identity, **arrays)
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)


def _fresh(widths: Sequence[int]) -> tuple[RunningMoments, ...]:
    return tuple(map(RunningMoments, widths))


def _resumed(arrays: Mapping[str, Any], widths: Sequence[int]) -> tuple[RunningMoments, ...]:
    stops = np.cumsum(widths)[:-1]
    parts = zip(
        arrays["count"],
        np.split(arrays["mean"], stops),
        np.split(arrays["squares"], stops),
        strict=True,
    )
    return tuple(
        RunningMoments.resumed({"count": count, "mean": mean, "squares": squares})
        for count, mean, squares in parts
    )


def _identity(model: CausalLM, encoded: Sequence[EncodedResponse]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        stride = max(1, weight.numel() // _SAMPLED_PER_PARAMETER)
        sample = weight.detach().flatten()[::stride].float().cpu().numpy()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + sample.tobytes())
    for row in encoded:
        digest.update(np.asarray([row.turn_start, *row.ids], np.int64).tobytes())
    return digest.hexdigest()
