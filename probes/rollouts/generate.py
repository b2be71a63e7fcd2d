"""On-policy responses of the protected model, with and without a supplied prefill.

Rows that end are dropped from the batch every few tokens, so one long response does not
make its neighbours pay; the cache goes on with the rest.

Knows batching, sampling and how a verdict becomes labels. Does not know who judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from probes.data.conversations import Conversation
from probes.data.generation import Generation
from probes.rollouts.types import Judge, Request
from probes.runs.identity import weights_digest
from probes.runs.progress import progress
from safe_decode.engines.transformers.coverage import record_of
from safe_decode.errors import ConfigurationError, DataError, PromptError
from safe_decode.prompts.chat import EncodedChat, encode_chat, stop_ids
from safe_decode.typing import CausalLM, Tokenizer

if TYPE_CHECKING:
    from transformers.generation.utils import GenerateDecoderOnlyOutput

__all__ = ["RolloutConfig", "rollout"]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are generated: as they will be when served.

    Attributes:
        max_new_tokens: The cap, beyond a prefill.
        do_sample: Sample, or take the likeliest token.
        temperature: Of sampling.
        top_p: Of sampling.
        top_k: Of sampling; 0 for no limit.
        seed: Of sampling; the global random state is left as it was.
        batch_size: Rows generated together.
        compact_every: Tokens after which rows that have ended are dropped.
    """

    max_new_tokens: int = 192
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 128
    compact_every: int = 24

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "compact_every", "temperature", "top_p"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be above 0.")

    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `generate` that choose the next token."""
        if not self.do_sample:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }

    def generation(self, weights: str, options: Mapping[str, str]) -> Generation:
        """Return what is recorded beside each response of a model."""
        return Generation(
            weights=weights,
            max_new_tokens=self.max_new_tokens,
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            options=options,
        )


class _Generated(NamedTuple):
    ids: tuple[int, ...]
    ended: bool


def rollout(
    model: CausalLM,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    judge: Judge | None = None,
    config: RolloutConfig | None = None,
) -> list[Conversation]:
    """Let the model answer, and record text, token ids and labels.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        requests: In any order; batches are formed by length.
        judge: Labels each response; without one the labels stay None.
        config: See `RolloutConfig`.

    Returns:
        One conversation a request, in the order of `requests`. `meta["label"]` holds the
        judge's word; of a broken response `response_harmful` is None.

    Raises:
        PromptError: Prompt, prefill and cap together exceed the model's context.
        DataError: The judge gave a label outside `Label`.
    """
    config = config or RolloutConfig()
    chats = [encode_chat(tokenizer, row.messages, prefill=row.prefill) for row in requests]
    _check_context(model, chats, config.max_new_tokens)
    stops = tuple(stop_ids(model, tokenizer))
    generation = config.generation(weights_digest(model), record_of(model.generation_config, stops))
    order = sorted(range(len(chats)), key=lambda row: len(chats[row].ids))
    found: dict[int, _Generated] = {}
    with progress("generating", len(chats)) as advance:
        for number, begin in enumerate(range(0, len(order), config.batch_size)):
            rows = order[begin : begin + config.batch_size]
            # A seed a batch: a batch alone repeats what it gave among others.
            with _seeded(config.seed + number, model):
                batch = _generate(model, [chats[row].ids for row in rows], stops, config)
            found.update(zip(rows, batch, strict=True))
            advance(len(rows))
    return [
        replace(
            _conversation(tokenizer, request, chats[row], found[row], judge), generation=generation
        )
        for row, request in enumerate(requests)
    ]


def _generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    stops: tuple[int, ...],
    config: RolloutConfig,
) -> list[_Generated]:
    longest = max(len(ids) for ids in prompts)
    padding = [longest - len(ids) for ids in prompts]
    pad = stops[0] if stops else 0  # never attended to
    rows = [[pad] * n + list(ids) for n, ids in zip(padding, prompts, strict=True)]
    mask_rows = [[0] * n + [1] * (longest - n) for n in padding]
    device = next(model.parameters()).device
    ids, mask = torch.tensor(rows, device=device), torch.tensor(mask_rows, device=device)
    live, cache = torch.arange(len(prompts), device=device), None
    content: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for budget in _chunks(config):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=budget,
            eos_token_id=list(stops) or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            **config.sampling(),
        )
        going_on = []
        for index, row in enumerate(live.tolist()):
            said = output.sequences[index, ids.shape[1] :].tolist()
            stop = next((i for i, token in enumerate(said) if token in stops), None)
            content[row] += said[:stop]
            ended[row] = stop is not None
            if stop is None:
                going_on.append(index)
        if not going_on:
            break
        kept = torch.tensor(going_on, device=device)
        live, ids, mask = live[kept], output.sequences[kept], _extended(mask[kept], output, ids)
        cache = _rest_of(output.past_key_values, kept)
    return [_Generated(tuple(c), e) for c, e in zip(content, ended, strict=True)]


def _chunks(config: RolloutConfig) -> Iterator[int]:
    for done in range(0, config.max_new_tokens, config.compact_every):
        yield min(config.compact_every, config.max_new_tokens - done)


def _extended(mask: Tensor, output: GenerateDecoderOnlyOutput, ids: Tensor) -> Tensor:
    new = output.sequences.shape[1] - ids.shape[1]
    return torch.cat([mask, mask.new_ones(len(mask), new)], dim=1)


def _rest_of(cache: object, kept: Tensor) -> DynamicCache | None:
    """Keep the rows that go on; other kinds of cache are computed anew by the next chunk."""
    if type(cache) is not DynamicCache:
        return None
    cache.batch_select_indices(kept)
    return cache


@contextmanager
def _seeded(seed: int, model: CausalLM) -> Iterator[None]:
    """Draws inside repeat with the seed; draws outside go on as if nothing had happened."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _conversation(
    tokenizer: Tokenizer,
    request: Request,
    chat: EncodedChat,
    generated: _Generated,
    judge: Judge | None,
) -> Conversation:
    prefill = tuple(chat.ids[chat.turn_start :])
    ids = (*prefill, *generated.ids)
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    label, onset = None, None
    if judge is not None:
        verdict = judge(request.messages, text)
        label, onset = verdict.label, verdict.onset_char
        if label not in ("refusal", "benign", "harmful", "broken"):
            raise DataError(f"the judge says {label!r}, wanted refusal, benign, harmful or broken.")
    judged = label not in (None, "broken")
    return Conversation(
        messages=request.messages,
        response=text,
        group=request.group,
        response_harmful=label == "harmful" if judged else None,
        prompt_harmful=request.prompt_harmful,
        refusal=label == "refusal" if judged else None,
        category=request.category,
        onset_char=onset if label == "harmful" else None,
        split=request.split,
        response_ids=ids,
        prefill_tokens=len(prefill),
        ended=generated.ended,
        meta={**request.meta, **({} if label is None else {"label": label})},
    )


def _check_context(model: CausalLM, chats: Sequence[EncodedChat], cap: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max((len(chat.ids) for chat in chats), default=0)
    if isinstance(limit, int) and longest + cap > limit:
        raise PromptError(
            f"a prompt of {longest} tokens and max_new_tokens={cap} exceed the model's context "
            f"of {limit}; shorten the prompt or lower max_new_tokens."
        )
