"""The same tokens judged offline: one forward, then the scalar reference of the monitor."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from benchmarks.serving.oracle import pair
from safe_decode.activations.tap import ActivationTap
from safe_decode.monitor.monitor import reference
from safe_decode.prompts.chat import encode_chat

__all__ = ["largest_difference"]


def largest_difference(
    messages: Sequence[Mapping[str, str]], said: Sequence[int], scores: Sequence[float | None]
) -> float:
    """Compare what a server told of a response with an offline judgement.

    Args:
        messages: The conversation.
        said: Ids of the model's own tokens that were shown.
        scores: The statistic of each; None where none was told.

    Returns:
        The largest absolute difference of a statistic.
    """
    own = pair()
    prompt = encode_chat(own.tokenizer, messages)
    scanned = prompt.prefill_tokens + 1
    with torch.no_grad(), _tap().listening() as beats:
        beats.keep_last(scanned + len(said))
        own.model(input_ids=torch.tensor([[*prompt.ids, *said]]), use_cache=False)
        logits = own.bundle.probe(beats.take()[0]).tolist()
    steps = reference(own.bundle.monitor, float("inf"), logits)[scanned:]
    pairs = zip(steps, scores, strict=True)
    return max((abs(s.statistic - told) for s, told in pairs if told is not None), default=0.0)


@functools.cache
def _tap() -> ActivationTap:
    return ActivationTap(pair().model, pair().bundle.probe.sites)
