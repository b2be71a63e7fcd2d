"""A separate guard model, used in the three ways that are deployed.

cached: a token head on a guard model with its own cache reads each token once, as
Qwen3Guard-Stream is described. rerun: the same guard without a cache reads the whole prefix at
each token, as streaming wrappers around a classifier do. chunked: an output rail reads 200
tokens, of which 50 were read before, as NeMo Guardrails' streaming output rails are described
(chunk_size 200, context_size 50); the guard is the same model rather than a hosted one, which
favours the rail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safe_decode.bench.arms import ArmCall, called_last
from safe_decode.bench.models import Subject

__all__ = ["CHUNK_TOKENS", "OVERLAP_TOKENS", "guard_model", "guarded_by"]

CHUNK_TOKENS, OVERLAP_TOKENS = 200, 50
Way = Literal["cached", "rerun", "chunked"]


def guard_model(subject: Subject, share: float, *, seed: int = 1) -> PreTrainedModel:
    """Make a guard of the subject's architecture, with about this share of its parameters.

    Args:
        subject: Whose configuration is scaled.
        share: Of the blocks' parameters: widths are scaled by its root, depth is kept.
        seed: Of the weights.
    """
    import copy

    from transformers import AutoModelForCausalLM

    config: Any = copy.deepcopy(subject.model.config)
    unit = 2 * config.num_attention_heads  # rotary embeddings want an even head
    factor = share**0.5
    config.hidden_size = max(unit, round(config.hidden_size * factor / unit) * unit)
    config.intermediate_size = max(8, round(config.intermediate_size * factor))
    config.head_dim = config.hidden_size // config.num_attention_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build: Any = AutoModelForCausalLM
        model = build.from_config(config)
    guard: PreTrainedModel = model.to(subject.model.device, subject.model.dtype).eval()
    return guard


def guarded_by(guard: PreTrainedModel, subject: Subject, way: Way) -> ArmCall:
    """Build the arm: the subject generates, the guard reads along in this way."""
    base = guard.get_decoder()  # type: ignore[no-untyped-call]  # transformers states no types
    head = nn.Linear(guard.config.hidden_size, 2).to(guard.device, guard.dtype)

    def run(**options: Any) -> None:  # noqa: ANN401 - those of generate
        prompt = options["input_ids"].shape[1]
        judge = {"cached": _cached, "rerun": _rerun, "chunked": _chunked}[way](base, head, prompt)

        def processor(ids: Tensor, scores: Tensor) -> Tensor:
            judge(ids)
            return scores

        with torch.no_grad(), called_last(subject.model, processor):
            subject.model.generate(**options)

    return run


Judge = Callable[[Tensor], None]


def _decide(head: nn.Module, hidden: Tensor) -> bool:
    return bool((head(hidden[:, -1]).argmax(-1) == 2).any())


def _cached(base: nn.Module, head: nn.Module, _prompt: int) -> Judge:
    from transformers import DynamicCache

    cache, seen = DynamicCache(), 0

    def judge(ids: Tensor) -> None:
        nonlocal seen
        new, seen = ids[:, seen:], ids.shape[1]
        _decide(head, base(new, past_key_values=cache, use_cache=True).last_hidden_state)

    return judge


def _rerun(base: nn.Module, head: nn.Module, _prompt: int) -> Judge:
    def judge(ids: Tensor) -> None:
        _decide(head, base(ids, use_cache=False).last_hidden_state)

    return judge


def _chunked(base: nn.Module, head: nn.Module, prompt: int) -> Judge:
    read = 0

    def judge(ids: Tensor) -> None:
        nonlocal read
        said = ids.shape[1] - prompt
        due = CHUNK_TOKENS if not read else CHUNK_TOKENS - OVERLAP_TOKENS
        if said - read >= due:
            read = said
            _decide(head, base(ids[:, -CHUNK_TOKENS:], use_cache=False).last_hidden_state)

    return judge
