"""Which weights a run was made with.

Knows parameters' bytes. Does not know what the run does.
"""

from __future__ import annotations

import hashlib

from safe_decode.typing import CausalLM

__all__ = ["weights_digest"]

_SAMPLED_PER_PARAMETER = 64


def weights_digest(model: CausalLM) -> str:
    """Digest a sample of every parameter: enough to notice a further training step."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        stride = max(1, weight.numel() // _SAMPLED_PER_PARAMETER)
        sample = weight.detach().flatten()[::stride].float().cpu().numpy()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()
