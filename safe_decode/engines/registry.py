"""The engines that a server can run on, by name. To add one, add its line.

Knows names and where classes are. Does not import an engine until it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from safe_decode.engines.interface import Engine
from safe_decode.errors import ConfigurationError

__all__ = ["ENGINES", "engine_named"]

ENGINES: Mapping[str, str] = {
    "transformers": "safe_decode.engines.transformers.batch.engine:TransformersEngine",
}
"""Module and class of each engine. A class takes a decoder and its own options."""


def engine_named(name: str) -> Callable[..., Engine]:
    """Import the class of an engine.

    Raises:
        ConfigurationError: There is no engine of this name.
    """
    if name not in ENGINES:
        raise ConfigurationError(f"engine={name!r} is not one of {', '.join(ENGINES)}; pass one.")
    module, _, attribute = ENGINES[name].partition(":")
    found: Callable[..., Engine] = getattr(import_module(module), attribute)
    return found
