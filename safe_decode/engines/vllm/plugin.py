"""The entry point that vLLM loads in each of its processes, in the group `vllm.general_plugins`.

Knows which setting switches the guard on and what is registered then. Does not know how anything
is read or judged. Imports nothing heavy, since vLLM logs a plugin that cannot be imported and
goes on without it; what fails in `register` does stop the engine.
"""

from __future__ import annotations

import logging
import os

__all__ = ["BUNDLE_VARIABLE", "register"]

BUNDLE_VARIABLE = "SAFE_DECODE_BUNDLE"
"""Names the bundle; the same variable as of `safe-decode serve`."""

_LOG = logging.getLogger("vllm.safe_decode")


def register() -> None:
    """Put the guard into the architectures of this process, if a bundle is named.

    May be called several times.

    Raises:
        UnsupportedError: This version of vLLM lacks what the guard stands on.
        SafeDecodeError: The bundle or a setting is of no use.
    """
    if not os.environ.get(BUNDLE_VARIABLE):
        _LOG.warning(
            "safe-decode is installed and %s is not set: this engine is not guarded",
            BUNDLE_VARIABLE,
        )
        return
    from safe_decode.engines.vllm.registration import register_architectures
    from safe_decode.engines.vllm.settings import settings_in_force

    settings_in_force()  # what is wrong is said before weights are read
    register_architectures()
