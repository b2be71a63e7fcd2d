"""Training of the pair: documents to batches, batches to a model.

Knows tokens, losses and schedules. Does not know what the documents mean.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from probes.organism.corpus import Document
from probes.organism.tokenizer import CONTEXT
from safe_decode.typing import CausalLM, Tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["Example", "Schedule", "Stage", "encode", "new_model", "only_at", "train"]

_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one conversation and the labels that carry loss."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """Examples, and how much of them is read before the next stage.

    Attributes:
        examples: In any order; read again from the start when they run out.
        tokens: Of the stage, padding excluded.
        batch_tokens: A batch, padding included, at most.
    """

    examples: Sequence[Example]
    tokens: int
    batch_tokens: int = 2560


@dataclass(frozen=True, slots=True)
class Schedule:
    """How fast to train.

    Attributes:
        peak_rate: AdamW's learning rate after the warm-up; falls along a cosine to a twentieth.
        matrix_rate: Where given, Muon trains the matrices of the blocks at this rate, and AdamW
            only embeddings and norms: sentences are learnt in a quarter of the tokens, the
            relation of the world is not.
        warmup_share: Share of the run in which the rates rise.
        weight_decay: On matrices only.
        heavy_ids: Token ids whose loss counts `heaviness` times.
        heaviness: How often.
    """

    peak_rate: float = 8e-4
    matrix_rate: float | None = None
    warmup_share: float = 0.03
    weight_decay: float = 0.02
    heavy_ids: tuple[int, ...] = ()
    heaviness: float = 1.0


def new_model(seed: int, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Make an untrained model of the organism's shape, float32, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(
    tokenizer: Tokenizer, documents: Iterable[Document], *, answers_only: bool
) -> list[Example]:
    """Turn documents into token ids and labels, cut at the context.

    Args:
        tokenizer: The organism's tokenizer.
        documents: Conversations that end with an assistant message.
        answers_only: Loss on the last answer alone, behind its given words; else on everything.
    """
    heads, answers, given = [], [], []
    for document in documents:
        messages = list(document.messages)
        head = str(
            tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        )
        words = messages[-1]["content"].split(" ")
        start = " ".join(words[: document.given_words])
        heads.append(head + start)
        rest = " ".join(words[document.given_words :])
        answers.append((" " if start else "") + rest + str(tokenizer.eos_token))
        given.append(start)
    head_ids: Any = tokenizer(heads, add_special_tokens=False)["input_ids"]
    answer_ids: Any = tokenizer(answers, add_special_tokens=False)["input_ids"]
    examples = []
    for head_tokens, answer_tokens in zip(head_ids, answer_ids, strict=True):
        ids = tuple(head_tokens + answer_tokens)[:CONTEXT]
        silent = len(head_tokens) if answers_only else 1
        labels = (_IGNORED,) * min(silent, len(ids)) + ids[silent:]
        examples.append(Example(ids, labels))
    return examples


def only_at(examples: Iterable[Example], ids: Collection[int]) -> list[Example]:
    """Keep the loss where one of some tokens has to be said, and nowhere else."""
    return [
        Example(e.ids, tuple(label if label in ids else _IGNORED for label in e.labels))
        for e in examples
    ]


def _batches(
    examples: Sequence[Example], batch_tokens: int, rng: random.Random
) -> Iterator[list[Example]]:
    """Yield batches of like length in random order, for ever."""
    while True:
        order = sorted(examples, key=lambda e: len(e.ids) + rng.random() * 8)
        batches: list[list[Example]] = [[]]
        for example in order:
            if (len(batches[-1]) + 1) * _width(len(example.ids)) > batch_tokens:
                batches.append([])
            batches[-1].append(example)
        rng.shuffle(batches)
        yield from (batch for batch in batches if batch)


def _staged(stages: Sequence[Stage], rng: random.Random) -> Iterator[list[Example]]:
    for stage in stages:
        seen = 0
        for batch in _batches(stage.examples, stage.batch_tokens, rng):
            yield batch
            seen += sum(len(e.ids) for e in batch)
            if seen >= stage.tokens:
                break


def _width(length: int) -> int:
    # Few distinct shapes, or the matrix kernels are compiled anew for every batch.
    return min(CONTEXT, -(-length // 32) * 32 if length <= 256 else -(-length // 128) * 128)


def _tensors(batch: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    width = _width(max(len(e.ids) for e in batch))
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), _IGNORED)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return ids, labels


def train(
    model: CausalLM,
    stages: Sequence[Stage],
    schedule: Schedule,
    *,
    seed: int,
    report: Callable[[int, float, float], None] | None = None,
) -> None:
    """Train in place, bfloat16 products over float32 weights.

    Args:
        model: Changed in place; left in evaluation mode.
        stages: Read one after the other; examples start again when they run out.
        schedule: Rates, over all stages together.
        seed: Order of the batches.
        report: Called now and then with tokens read, mean loss since the last call, seconds.
    """
    model.train()
    optimizers = _optimizers(model, schedule)
    batches = _staged(stages, random.Random(seed))
    tokens = sum(stage.tokens for stage in stages)
    weights = torch.ones(model.config.vocab_size)
    weights[list(schedule.heavy_ids)] = schedule.heaviness
    config: Any = model.config
    pad = config.pad_token_id
    assert isinstance(pad, int)
    seen, reported, losses, began = 0, 0, [0.0], time.monotonic()
    for batch in batches:
        rate = _rate(seen / tokens, schedule.warmup_share)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
        ids, labels = _tensors(batch, pad)
        loss = _loss(model, ids, labels, weights)
        cast(nn.Module, model).zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seen += sum(len(e.ids) for e in batch)
        losses.append(loss.item())
        if report is not None and (seen - reported > tokens // 20 or seen >= tokens):
            mean = sum(losses[1:]) / max(1, len(losses) - 1)
            report(seen, mean, time.monotonic() - began)
            reported, losses = seen, [0.0]
    model.eval()


def _optimizers(model: CausalLM, schedule: Schedule) -> list[torch.optim.Optimizer]:
    llama: Any = model
    rest = list(model.parameters())
    made: list[torch.optim.Optimizer] = []
    if schedule.matrix_rate is not None:
        blocks = [p for p in llama.model.layers.parameters() if p.ndim == 2]
        taken = {id(p) for p in blocks}
        rest = [p for p in rest if id(p) not in taken]
        decay = schedule.weight_decay
        made.append(torch.optim.Muon(blocks, lr=schedule.matrix_rate, weight_decay=decay))
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    made.append(torch.optim.AdamW(groups, lr=schedule.peak_rate, betas=(0.9, 0.98), fused=True))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def _loss(model: CausalLM, ids: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean cross-entropy; logits are made where a label asks for them."""
    llama: Any = model
    wanted = labels[:, 1:] != _IGNORED
    with torch.autocast("cpu", torch.bfloat16):
        hidden = llama.model(input_ids=ids).last_hidden_state
        logits = llama.lm_head(hidden[:, :-1][wanted])
    targets = labels[:, 1:][wanted]
    return torch.nn.functional.cross_entropy(logits.float(), targets, weight=weights)


def _rate(progress: float, warmup: float) -> float:
    if progress < warmup:
        return progress / warmup + 1e-3
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
