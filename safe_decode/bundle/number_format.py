"""The name of the numbers a model computes in, as certificates state it.

A plain model's is its dtype, "bfloat16"; where parameters differ, all of them, "bfloat16+float32".
A quantised model's names the method first, "bitsandbytes-4bit+bfloat16", and a GGUF file whose
blocks stay packed names the kinds of its blocks, "gguf-packed:Q4_K,Q6_K+float32". A GGUF file that
was dequantised is a plain model, since that is what computes.

Knows the words of a fingerprint. Does not know models. Imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["GGUF_TYPES", "flags_for", "number_format"]

GGUF_TYPES = "types"
"""Entry of a packed GGUF model's quantisation that names the kinds of its blocks."""

_FLOATING = ("float", "bfloat")
_PACKED = "gguf-packed"


def number_format(dtype: str, quantisation: str) -> str:
    """Name the number format of a fingerprint.

    Args:
        dtype: Of the parameters, as torch spells it, several joined by a comma.
        quantisation: Its configuration as JSON; "none" without.

    Returns:
        One word without blanks.
    """
    names = [name.removeprefix("torch.") for name in dtype.split(",")]
    method = "" if quantisation == "none" else _method(json.loads(quantisation))
    # What packed weights are stored in (bytes) says nothing of what is computed.
    computing = [name for name in names if name.startswith(_FLOATING)] if method else names
    return "+".join([*([method] if method else []), *computing])


def flags_for(name: str) -> str:
    """Say by which options of a command a model is loaded in a number format."""
    method, _, rest = name.partition("+")
    if method.startswith(_PACKED):
        return f"--gguf-file FILE --gguf packed --dtype {rest.split('+')[0] or 'auto'}"
    dtypes = [one for one in name.split("+") if one.startswith(_FLOATING)]
    if not dtypes:
        return "--dtype auto"
    # A model with some parameters in another dtype is loaded in its narrowest, which is the main.
    return f"--dtype {min(dtypes, key=_width)}"


def _width(dtype: str) -> tuple[int, str]:
    return int("".join(c for c in dtype if c.isdigit())[:2] or 0), dtype


def _method(config: dict[str, Any]) -> str:
    method = str(config.get("quant_method", "quantised"))
    if method == "gguf":
        kinds: Sequence[str] = config.get(GGUF_TYPES) or ("unknown",)
        return f"{_PACKED}:{','.join(kinds)}"
    if method == "bitsandbytes":
        is_narrow = config.get("load_in_4bit") or config.get("_load_in_4bit")
        return f"{method}-{4 if is_narrow else 8}bit"
    if isinstance(bits := config.get("bits"), int):
        return f"{method}-{bits}bit"
    kind = config.get("quant_type")
    if isinstance(kind, dict):  # torchao: {"default": {"_type": "Int8WeightOnlyConfig", ...}}
        kind = next((one.get("_type") for one in kind.values() if isinstance(one, dict)), None)
    return f"{method}:{kind}" if isinstance(kind, str) and kind.isalnum() else method
