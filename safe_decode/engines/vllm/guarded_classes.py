"""Our classes of vLLM's models, made when vLLM asks for them by name.

Knows which base class belongs to a name. Does not know how sites are read.
"""

from __future__ import annotations

import importlib
from functools import cache

from torch import nn

from safe_decode.engines.vllm.guarded_model import GuardedModelMixin
from safe_decode.engines.vllm.registration import GUARDED

__all__ = ["guarded_class"]


def __getattr__(name: str) -> type[nn.Module]:
    """Return our class of an architecture, as vLLM's registry looks it up."""
    if name not in GUARDED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return guarded_class(name)


@cache
def guarded_class(name: str) -> type[nn.Module]:
    """Make our class of an architecture: vLLM's own, whose forward also writes scores."""
    module = importlib.import_module(f"vllm.model_executor.models.{GUARDED[name]}")
    base = getattr(module, name)
    return type(name, (GuardedModelMixin, base), {"__module__": __name__})
