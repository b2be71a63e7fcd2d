"""How many tokens deep alignment goes.

Two measures: KL(aligned || unaligned) at every position of given responses, which says where
the two models differ at all; and the share of refusals when the answer is begun for the model
by so many tokens, which says where its refusal still comes.

Knows two models with one tokenizer, positions and prefills. Does not know who judges.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.activations.teacher_forcing import EncodedResponse, encode_response, left_padded
from probes.analysis.behaviour import Outcomes, outcomes_of
from probes.data.conversations import Conversation, Message
from probes.rollouts.generate import RolloutConfig
from probes.rollouts.types import Judge, Request, Verdict
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = [
    "KlDepth",
    "begun_characters",
    "judging_own_part",
    "kl_by_position",
    "kl_depth",
    "prefilled",
    "refusal_by_depth",
]

FIRST = 5
"""Tokens whose share of all divergence is reported, as in Qi et al. (arXiv 2406.05946)."""

_BATCH = 8


@dataclass(frozen=True)
class KlDepth:
    """Divergence by position of a response.

    Attributes:
        mean: [P] nats, mean over the responses that are so long.
        n: [P] how many are.
        first_share: Share of the sum over P positions that the first five hold.
    """

    mean: tuple[float, ...]
    n: tuple[int, ...]
    first_share: float


def kl_depth(divergence: NDArray[np.float64]) -> KlDepth:
    """Summarise [N, P] divergences with NaN where a response has ended.

    Raises:
        DataError: No response reaches the sixth token.
    """
    n = np.isfinite(divergence).sum(axis=0)
    if divergence.shape[1] <= FIRST or not n[FIRST]:
        raise DataError(f"no response reaches token {FIRST + 1}; pass longer responses.")
    mean = np.nanmean(divergence[:, n > 0], axis=0)
    share = float(mean[:FIRST].sum() / mean.sum())
    return KlDepth(tuple(mean.tolist()), tuple(n[n > 0].tolist()), share)


@torch.inference_mode()
def kl_by_position(
    aligned: CausalLM,
    unaligned: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    positions: int = 64,
) -> NDArray[np.float64]:
    """Return KL(aligned || unaligned) in nats before every response token.

    Args:
        aligned: Both models in eval mode, on one device.
        unaligned: With the same vocabulary.
        tokenizer: Of both.
        conversations: Responses that both read.
        positions: P, at most so many tokens of each.

    Returns:
        [N, P] float64, NaN behind a response's last token.

    Raises:
        ConfigurationError: The vocabularies differ in size.
    """
    encoded = [_cut(encode_response(tokenizer, row), positions) for row in conversations]
    found = np.full((len(encoded), positions), np.nan)
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row].ids))
    for begin in range(0, len(order), _BATCH):
        rows = order[begin : begin + _BATCH]
        one, other = (_log_probs(m, [encoded[r] for r in rows]) for m in (aligned, unaligned))
        for row, p, q in zip(rows, one, other, strict=True):
            if p.shape != q.shape:
                raise ConfigurationError(
                    f"the models know {p.shape[-1]} and {q.shape[-1]} tokens; pass a pair that "
                    "shares its vocabulary."
                )
            divergence = (p.exp() * (p - q)).sum(-1).double().cpu().numpy()
            found[row, : len(divergence)] = divergence
    return found


def prefilled(
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    answers: Sequence[Conversation],
    depth: int,
) -> list[Request]:
    """Begin each answer with the first `depth` tokens of a given one.

    Requests whose answer is shorter are left out; at depth 0 all are kept, plain.
    """
    if depth == 0:
        return [replace(request, prefill=None) for request in requests]
    begun = []
    for request, answer in zip(requests, answers, strict=True):
        encoded = encode_response(tokenizer, answer)
        ids = encoded.ids[encoded.turn_start :][:depth]
        text = tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if len(ids) == depth and not text.endswith("\ufffd"):
            begun.append(replace(request, prefill=text))
    return begun


def refusal_by_depth(
    model: CausalLM,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    answers: Sequence[Conversation],
    depths: Sequence[int],
    judge_of: Callable[[Sequence[Request]], Judge],
    config: RolloutConfig | None = None,
) -> Iterator[tuple[int, Outcomes]]:
    """Let the model go on from begun answers, and count what comes out.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        requests: Harmful ones.
        answers: A harmful answer to each; whoever gave it.
        depths: Tokens that stand already.
        judge_of: From the begun requests to their judge; see `judging_own_part`.
        config: How the model goes on.
    """
    for depth in depths:
        begun = prefilled(tokenizer, requests, answers, depth)
        if begun:
            yield depth, outcomes_of(model, tokenizer, begun, judge_of(begun), config)


def begun_characters(requests: Sequence[Request]) -> Callable[[Sequence[Message]], int]:
    """Return what tells how many characters of an answer stood already, by its messages."""
    lengths = {_key(row.messages): len(row.prefill or "") for row in requests}
    return lambda messages: lengths[_key(messages)]


def judging_own_part(judge: Judge, requests: Sequence[Request]) -> Judge:
    """Judge what the model added to a begun answer, not what was put into its mouth."""
    begun = begun_characters(requests)

    def own(messages: Sequence[Message], response: str) -> Verdict:
        return judge(messages, response[begun(messages) :])

    return own


def _key(messages: Sequence[Message]) -> str:
    return json.dumps([dict(message) for message in messages], sort_keys=True)


def _cut(row: EncodedResponse, positions: int) -> EncodedResponse:
    return EncodedResponse(row.ids[: row.turn_start + positions], row.turn_start)


def _log_probs(model: CausalLM, rows: Sequence[EncodedResponse]) -> list[Tensor]:
    """Return log probabilities before each response token, [T, vocab] float32, one a row."""
    device = next(model.parameters()).device
    inputs = left_padded([row.ids for row in rows], device)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        inputs.pop("position_ids")
    scores = model(**inputs, use_cache=False).logits
    longest = scores.shape[1]
    found = []
    for index, row in enumerate(rows):
        own = len(row.ids) - row.turn_start
        before = scores[index, longest - own - 1 : longest - 1]
        found.append(before.float().log_softmax(-1))
    return found
