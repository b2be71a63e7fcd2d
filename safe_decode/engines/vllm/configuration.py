"""The hook that vLLM calls with an engine's configuration, before anything is loaded.

Here configurations are refused, and the guard's processor and scheduler come in, so that one
setting is enough. Knows vLLM's configuration. Does not know what the processor does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from safe_decode.engines.vllm.presence import SCHEDULER
from safe_decode.engines.vllm.refusals import require_supported
from safe_decode.engines.vllm.settings import EngineSettings, settings_in_force
from safe_decode.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

__all__ = ["ConfigurationHook", "hooked"]

_PACKAGE = "safe_decode.engines.vllm"


class _PresentHook(Protocol):
    def verify_and_update_config(self, vllm_config: VllmConfig) -> None: ...

    def verify_and_update_model_config(self, model_config: ModelConfig) -> None: ...


class ConfigurationHook:
    """Stands in vLLM's map of hooks by architecture.

    Args:
        present: vLLM's own hook of the architecture, which runs first; or None.
        is_guarded: Whether we have a class for the architecture.
    """

    def __init__(self, present: _PresentHook | None, *, is_guarded: bool) -> None:
        self.present, self._is_guarded = present, is_guarded

    def verify_and_update_model_config(self, model_config: ModelConfig) -> None:
        """Leave the model's configuration to vLLM's own hook."""
        if self.present is not None:
            self.present.verify_and_update_model_config(model_config)

    def verify_and_update_config(self, vllm_config: VllmConfig) -> None:
        """Refuse what cannot be guarded, and put the guard in.

        Raises:
            UnsupportedError: The architecture or an option is not guarded.
            FingerprintMismatchError: The bundle has no certificate for the engine's dtype.
        """
        if self.present is not None:
            self.present.verify_and_update_config(vllm_config)
        if not self._is_guarded:
            from safe_decode.engines.vllm.registration import GUARDED

            raise UnsupportedError(
                f"architecture={vllm_config.model_config.architecture} is not guarded in vLLM, "
                f"wanted one of {', '.join(GUARDED)}; serve it with `safe-decode serve`, or unset "
                "SAFE_DECODE_BUNDLE to run it without a guard."
            )
        _guard(vllm_config, settings_in_force())


def hooked(present: _PresentHook | None, *, is_guarded: bool) -> ConfigurationHook:
    """Wrap the hook of an architecture, once however often this is called."""
    if isinstance(present, ConfigurationHook):
        return present
    return ConfigurationHook(present, is_guarded=is_guarded)


def _guard(config: VllmConfig, settings: EngineSettings) -> None:
    from vllm.platforms import current_platform

    require_supported(config, is_cpu=current_platform.is_cpu())
    settings.measured_in(config.model_config.dtype)
    runner = 2 if config.use_v2_model_runner else 1
    processor = f"{_PACKAGE}.runner_v{runner}:GuardProcessorV{runner}"
    config.model_config.logits_processors = [
        *(config.model_config.logits_processors or ()),
        processor,
    ]
    config.scheduler_config.scheduler_cls = SCHEDULER
    # What vLLM compiles is cached by its configuration, and what is compiled depends on the sites.
    config.additional_config = {
        **(config.additional_config or {}),
        "safe_decode": {"bundle": settings.bundle.digest},
    }
