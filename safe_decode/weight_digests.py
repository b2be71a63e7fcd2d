"""Digests of a model's parameters, of each of which a few values are read.

Knows names of parameters and how offloaded ones are brought back. Does not know configurations,
tokenizers or bundles.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from safe_decode.errors import UnsupportedError
from safe_decode.typing import CausalLM

__all__ = ["weight_digests"]

SAMPLED_VALUES = 256
"""Values read from each parameter, evenly spaced."""

_LAYER = re.compile(r"^(.*?\.(?:layers|h|blocks|block)\.\d+)\.")


def weight_digests(
    parameters: Iterable[tuple[str, Tensor]],
    *,
    model: CausalLM | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, str]:
    """Digest parameters by decoder block; what stands in none is "the rest".

    Args:
        parameters: By name.
        model: That they belong to, which may have offloaded some; None: all are there.
        dtype: In which their values are read; None: their own. Without a model only.

    Raises:
        UnsupportedError: Parameters are on the meta device, and nothing brings them back.
    """
    hashes: dict[str, Any] = {}
    for name, parameter in sorted(parameters, key=lambda named: named[0]):
        layer = _LAYER.match(name)
        group = hashes.setdefault(layer[1] if layer else "the rest", hashlib.sha256())
        group.update(f"{name}{tuple(parameter.shape)}".encode())
        if model is None:
            group.update(_sampled_bytes(parameter, dtype))
            continue
        with _loaded(model, name, parameter) as values:
            group.update(_sampled_bytes(values))
    return {group: value.hexdigest()[:16] for group, value in sorted(hashes.items())}


@contextmanager
def _loaded(model: CausalLM, name: str, parameter: Tensor) -> Iterator[Tensor]:
    """Bring back for a moment what accelerate has put on the disk or in another memory."""
    if not parameter.is_meta:
        yield parameter
        return
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not hasattr(module, "_hf_hook"):
        raise UnsupportedError(
            f"parameter {name} is on the meta device and cannot be read; load the model's "
            "weights before its fingerprint is taken."
        )
    from accelerate.utils import align_module_device  # whoever has put the hook there has it

    with align_module_device(module):
        yield getattr(module, leaf)


def _sampled_bytes(parameter: Tensor, dtype: torch.dtype | None = None) -> bytes:
    if hasattr(parameter, "__tensor_flatten__"):
        # A quantised tensor of several plain ones, as torchao's are; its own values are computed.
        names, _ = parameter.__tensor_flatten__()
        return b"".join(_sampled_bytes(getattr(parameter, name)) for name in names)
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLED_VALUES)
    sample = flat[::step][:SAMPLED_VALUES].contiguous().to("cpu", dtype)
    return bytes(sample.view(torch.uint8).numpy().tobytes())
