"""Whether an engine that was started is guarded: vLLM only logs a plugin that it cannot import.

All of the guard follows from an engine's configuration: a worker whose model is not ours, or whose
processor cannot be imported, does not start. So the configuration is looked at. Knows what our hook
writes there. Does not know how anything is judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safe_decode.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["SCHEDULER", "require_guarded"]

SCHEDULER = "safe_decode.engines.vllm.scheduler.guarded_scheduler"
"""What makes the scheduler of a guarded engine."""


def require_guarded(engine: LLM | AsyncLLM) -> str:
    """Check that an engine is guarded.

    Args:
        engine: Offline or of a server.

    Returns:
        The digest of its bundle.

    Raises:
        UnsupportedError: It is not.
    """
    inner = getattr(engine, "llm_engine", engine)
    config: VllmConfig = inner.vllm_config
    ours = (config.additional_config or {}).get("safe_decode")
    if ours is None or config.scheduler_config.scheduler_cls != SCHEDULER:
        raise UnsupportedError(
            f"the engine of {config.model_config.model} is not guarded: the plugin safe_decode was "
            "not loaded; set SAFE_DECODE_BUNDLE before the engine starts, name safe_decode in "
            "VLLM_PLUGINS if that is set, and look for an error of the import in the log."
        )
    return str(ours["bundle"])
