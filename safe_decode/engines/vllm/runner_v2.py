"""The guard in vLLM's second model runner, which GPUs run: requests have slots of their own.

The state beside the model has taken note of a step; the processor has only to decide. It is loaded
where requests come in as well, so nothing of a worker is imported here. Knows this interface. Does
not know how rows are judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from safe_decode.engines.vllm.rows.row_judge import JudgedRows
from safe_decode.engines.vllm.rows.row_terms import require_request
from safe_decode.engines.vllm.runtime import runtime_of
from safe_decode.engines.vllm.settings import settings_in_force
from safe_decode.errors import BeatError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor.interface import (
        LogitsContext,
        LogitsProcRequestState,
    )

__all__ = ["GuardProcessorV2"]


class GuardProcessorV2(LogitsProcessor):  # type: ignore[misc]  # vLLM is not there when types are checked
    """The guard's logits processor; the last one, since the others come before it in the list.

    Args:
        vllm_config: Of the engine.
        req_states: Of its requests.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        super().__init__(vllm_config, req_states)
        self._runtime, self._requests = runtime_of(vllm_config), req_states

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check what a request asks for, where requests come in; see `require_request`."""
        require_request(sampling_params, settings_in_force())

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Say that every request is processed; it was seated already."""
        del req_idx, sampling_params
        return True

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Judge the forward that made the logits [rows, vocab], and force what rows must say.

        Raises:
            BeatError: No forward was prepared since the last call, or another batch was.
            CanaryError: See `GuardRuntime.decide`.
        """
        batch, self._runtime.batch_v2 = self._runtime.batch_v2, None
        if batch is None or len(batch[0]) != len(logits):
            raise BeatError(
                f"the engine chooses for {len(logits)} rows and the newest forward had "
                f"{'none' if batch is None else len(batch[0])}; each token has exactly one score."
            )
        read, scheduled, known, blocks = batch
        judged = JudgedRows(
            seats=self._runtime.seat_of_request[ctx.idx_mapping_np],
            read=read,
            in_forward=scheduled,
            known=known,
            newest=ctx.input_ids.long(),
            blocks=blocks,
            block_size=self._runtime.block_size,
        )
        return self._runtime.decide(judged, self._tokens(judged, ctx), logits)

    def _tokens(self, judged: JudgedRows, ctx: LogitsContext) -> Tensor:
        """[rows, n] the ids at the positions that are due; what stands behind them is not read."""
        judge = self._runtime.judge
        assert judge is not None
        width = int(judge.due_positions(judged).max(initial=0))
        if width <= 1:
            return judged.newest[:, None][:, :width]
        held = self._requests.all_token_ids.gpu
        first = torch.from_numpy(judge.consumed[judged.seats]).to(held.device)
        positions = first[:, None] + torch.arange(width, device=held.device)
        own = held[ctx.idx_mapping.long()]
        found: Tensor = own.gather(1, positions.clamp_max(own.shape[1] - 1)).long()
        return found
