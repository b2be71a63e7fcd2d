"""The assistant's header, put behind the answer again every 25 tokens, on a forked cache.

After Any-Depth Alignment as it is described: the model itself says, at its own header, whether
it would have refused. The fork copies the cache; the header's few tokens pass the whole model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from safe_decode.bench.arms import ArmCall, called_last
from safe_decode.bench.models import Subject

__all__ = ["EVERY_TOKENS", "HEADER_TOKENS", "header_again"]

EVERY_TOKENS = 25
HEADER_TOKENS = 5


def header_again(subject: Subject) -> ArmCall:
    """Build the arm."""
    model = subject.model

    def run(**options: Any) -> None:  # noqa: ANN401 - those of generate
        from transformers import DynamicCache

        ids = options["input_ids"]
        config: Any = model.config  # the cache asks for transformers' own class
        cache = DynamicCache(config=config)
        header = ids[:, :HEADER_TOKENS]
        prompt = ids.shape[1]

        def processor(now: Tensor, scores: Tensor) -> Tensor:
            said = now.shape[1] - prompt
            if said and said % EVERY_TOKENS == 0:
                fork = copy.deepcopy(cache)
                seen = model(header, past_key_values=fork, use_cache=True, logits_to_keep=1)
                bool((seen.logits[:, -1, 0] > torch.inf).any())
            return scores

        with torch.no_grad(), called_last(model, processor):
            model.generate(**options, past_key_values=cache)

    return run
