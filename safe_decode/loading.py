"""Loading a model and its tokenizer by name or path.

Knows how a name becomes a model on a device. Does not know prompts, bundles or generation.
Imports transformers only when a model is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from safe_decode.errors import ConfigurationError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["Dtype", "Loaded", "load_model"]

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in eval mode with its tokenizer, as transformers yields them."""

    model: CausalLM
    tokenizer: Tokenizer


def load_model(name: str | Path, *, device: str = "cpu", dtype: Dtype = "float32") -> Loaded:
    """Load a causal language model and its tokenizer by name or path.

    Args:
        name: A directory in the Hugging Face format, or a name that transformers resolves.
        device: Where the model goes, as torch spells it.
        dtype: In what it computes.

    Raises:
        ConfigurationError: Unknown dtype or device, or nothing to load under that name.
    """
    if dtype not in get_args(Dtype):
        raise ConfigurationError(f"dtype={dtype!r} is not one of {get_args(Dtype)}; pass one.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _as_configuration_error(name, device):
        target = torch.device(device)
        tokenizer = AutoTokenizer.from_pretrained(str(name))
        model: CausalLM = AutoModelForCausalLM.from_pretrained(
            str(name), dtype=getattr(torch, dtype)
        )
        return Loaded(model.to(target).eval(), tokenizer)


@contextlib.contextmanager
def _as_configuration_error(name: str | Path, device: str) -> Iterator[None]:
    """Turn what transformers and torch raise on bad names into one clear error."""
    try:
        yield
    # AssertionError: what torch raises for "cuda" in a build without CUDA.
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        cause = str(error).strip().splitlines()[:1]
        raise ConfigurationError(
            f"model={str(name)!r} cannot be loaded on device={device!r}: {''.join(cause)} Pass "
            "a directory or name of a causal language model, and a device that is there."
        ) from error
