"""What the first model runner leaves in the context of a forward: where its rows lie.

Knows vLLM's forward context. Does not know scores or requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ForwardV1"]


@dataclass(frozen=True)
class ForwardV1:
    """What one forward has read.

    Attributes:
        slots: [tokens] where each position's keys and values lie.
        starts: [rows + 1] where the rows begin among them.
        read: [rows] positions of each row that were read so far.
        blocks: [rows, n] blocks that hold each row.
    """

    slots: Tensor
    starts: Tensor
    read: Tensor
    blocks: Tensor

    @classmethod
    def current(cls, layer: str) -> ForwardV1 | None:
        """Read the context of the present forward; None: it is a trial without a cache.

        Args:
            layer: Name of an attention layer that keeps every position.
        """
        from vllm.forward_context import get_forward_context, is_forward_context_available

        if not is_forward_context_available():
            return None
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict) or layer not in metadata:
            return None
        own = metadata[layer]
        return cls(own.slot_mapping, own.query_start_loc, own.seq_lens, own.block_table)
