"""What stands beside a guarded model in vLLM's second model runner, which GPUs run.

The runner tells it of requests, of the cache and of each step; what graphs read lies in buffers
that never move. Knows this interface. Does not know how rows are judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from safe_decode.engines.vllm.runtime import runtime_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache

__all__ = ["GuardedModelState"]


class GuardedModelState(DefaultModelState):  # type: ignore[misc]  # vLLM is not there when types are checked
    """What stands beside the model; tells the guard of requests, the cache and steps.

    Args:
        vllm_config: Of the engine.
        model: Ours.
        encoder_cache: None, since models of text alone are guarded.
        device: Of the model.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self._runtime = runtime_of(vllm_config)
        self._group = 0

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Seat a request."""
        super().add_request(req_index, new_req_data)
        known = new_req_data.prefill_token_ids or new_req_data.prompt_token_ids
        seat = self._runtime.join(
            new_req_data.req_id,
            new_req_data.prompt_token_ids,
            new_req_data.sampling_params,
            len(known),
        )
        self._runtime.seat_of_request[req_index] = seat

    def remove_request(self, req_id: str) -> None:
        """Let a request go: it has ended, or was preempted and comes back."""
        super().remove_request(req_id)
        self._runtime.leave(req_id)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        """Make the slots and the buffer that graphs read, before graphs are captured."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        layer = self._runtime.layer
        groups = kv_cache_config.kv_cache_groups
        self._group = next(i for i, one in enumerate(groups) if layer in one.layer_names)
        self._runtime.block_size = int(block_tables.block_sizes[self._group])
        n_slots = int(kv_cache_config.num_blocks) * self._runtime.block_size
        self._runtime.allocate(n_slots, self.device)
        self._runtime.buffer = torch.full(
            (block_tables.slot_mappings.shape[1],), -1, dtype=torch.int64, device=self.device
        )

    def prepare_attn(self, *args: object, **kwargs: object) -> dict[str, object]:
        """Leave the slots of a forward where the model finds them, padding marked as such.

        The arguments are those of the base class: the batch first, the slots of each group of
        the cache fourth.
        """
        slot_mappings = kwargs["slot_mappings"] if "slot_mappings" in kwargs else args[3]
        assert isinstance(slot_mappings, Tensor)
        own, buffer = slot_mappings[self._group], self._runtime.buffer
        assert buffer is not None and self._runtime.slots is not None
        buffer.fill_(-1)
        buffer[: len(own)].copy_(own)
        self._runtime.slots.forward.add_(1)
        built: dict[str, object] = super().prepare_attn(*args, **kwargs)
        return built

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: Tensor,
    ) -> None:
        """Take note of the rows of a step."""
        super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)
        scheduled = np.asarray(input_batch.num_scheduled_tokens, dtype=np.int64)
        read = input_batch.num_computed_tokens_np.astype(np.int64) + scheduled
        known = np.where(input_batch.is_prefilling_np, input_batch.prefill_len_np, read)
        self._runtime.batch_v2 = (
            read,
            scheduled,
            known.astype(np.int64),
            block_tables[self._group][: input_batch.num_reqs],
        )
