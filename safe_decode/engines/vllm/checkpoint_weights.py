"""The weights of a model as they lie on the disk, by name, for their fingerprint.

An engine joins and splits parameters, so the fingerprint is taken of the files that it reads; that
it computes what they say is shown by the canary. Knows safetensors files. Does not know engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from safe_decode.errors import UnsupportedError

__all__ = ["named_weights", "weights_folder"]


def weights_folder(model: str, revision: str | None) -> Path:
    """Find the folder of a model that was loaded: a path, or a name whose files are kept."""
    path = Path(model)
    if path.is_dir():
        return path
    found = snapshot_download(
        model, revision=revision, allow_patterns=["*.safetensors", "*.json"], local_files_only=True
    )
    return Path(found)


def named_weights(folder: Path, *, is_tied: bool) -> Iterator[tuple[str, Tensor]]:
    """Read every parameter's name; its values are mapped into memory, not read.

    Args:
        folder: With safetensors files.
        is_tied: Whether the head shares the weights of the embedding, so that it has no own.

    Raises:
        UnsupportedError: There is no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedError(
            f"model={folder} has no safetensors file, so its fingerprint cannot be taken; convert "
            "the weights with save_pretrained."
        )
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                is_computed = name.endswith("rotary_emb.inv_freq")
                if not is_computed and not (is_tied and name == "lm_head.weight"):
                    yield name, tensors.get_tensor(name)
