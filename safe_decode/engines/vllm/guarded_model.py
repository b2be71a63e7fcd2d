"""What is added to a class of vLLM's models: its forward also scores every position.

Knows the forward of a causal model in vLLM, and where its scores go. Does not know requests or
decisions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from safe_decode.engines.vllm.runtime import GuardRuntime, runtime_of
from safe_decode.engines.vllm.site_reader import SiteReader

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sequence import IntermediateTensors

__all__ = ["GuardedModelMixin"]


class GuardedModelMixin(nn.Module):
    """Stands before a class of vLLM's in the order of bases.

    Args:
        vllm_config: Of the engine.
        prefix: Of the parameters' names.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        parameter = next(self.parameters())
        runtime = runtime_of(vllm_config)
        runtime.attach(parameter.device)
        self._runtime: GuardRuntime = runtime
        self._reader = SiteReader(
            self,
            runtime.probe.sites,
            most_rows=_most_rows(vllm_config),
            device=parameter.device,
            dtype=vllm_config.model_config.dtype,
        )

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Run the model and write the score of every position to its slot.

        Args:
            input_ids: [rows].
            positions: [rows].
            intermediate_tensors: Of pipeline parallelism, which is refused.
            inputs_embeds: Refused at admission.

        Returns:
            [rows, d_model], exactly what the base class returns.
        """
        output = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        hidden, features = self._reader.split(output)
        self._runtime.write(features, input_ids, positions)
        self._reader.forget(features)
        return hidden

    def load_weights(self, weights: object) -> set[str]:
        """Load the weights, and check first that they are those the bundle was made for."""
        self._runtime.require_fingerprint()
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]  # vLLM's
        return loaded

    @staticmethod
    def get_model_state_cls() -> type:
        """Name what vLLM's second model runner keeps beside the model."""
        from safe_decode.engines.vllm.model_state_v2 import GuardedModelState

        return GuardedModelState


def _most_rows(config: VllmConfig) -> int:
    """Count the rows that a forward may have, graphs' padding included."""
    captured = config.compilation_config.max_cudagraph_capture_size or 0
    return max(int(config.scheduler_config.max_num_batched_tokens), int(captured))
