"""Fine-tune a chat model on conversations while some of its units are held still.

Loss falls on the response and the token that ends it, never on the prompt. Training is
`transformers.Trainer`'s: schedules, accumulation, clipping, bf16, checkpoints and resume are
its own. With `lora_rank` an adapter of PEFT is trained, and what is saved is both the adapter
and the merged model.

Knows encoding, padding and the trainer's options. What is frozen is in `presets`.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from probes.activations.teacher_forcing import encode_response
from probes.data.conversations import Conversation
from probes.finetuning.freeze import UnitFreeze
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.prompts.chat import stop_ids
from safe_decode.typing import CausalLM, Tokenizer

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["FinetuneConfig", "Tuned", "encode_for_training", "finetune", "pad_batch", "trainer_for"]

_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How to train.

    Attributes:
        epochs: Passes over the data; frozen runs of the paper get twice those of free ones.
        learning_rate: Peak of a cosine schedule.
        warmup_share: Of the steps.
        batch_size: Conversations a forward.
        accumulation: Forwards a step.
        weight_decay: AdamW's.
        max_grad_norm: Clipping.
        max_length: Tokens of a conversation; longer ones are cut at the end.
        bf16: Compute in bfloat16 over float32 weights.
        lora_rank: Rank of the adapter; 0 trains in full.
        lora_alpha: Scale of the adapter times its rank.
        save_steps: Steps between checkpoints; 0 for one an epoch.
        seed: Of order and adapter.

    Raises:
        ConfigurationError: A number outside its range.
    """

    epochs: float = 1.0
    learning_rate: float = 2e-5
    warmup_share: float = 0.03
    batch_size: int = 8
    accumulation: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    bf16: bool = False
    lora_rank: int = 0
    lora_alpha: int = 16
    save_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch_size", "accumulation", "max_length"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be above 0.")
        for name in ("lora_rank", "save_steps", "weight_decay", "warmup_share"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be >= 0.")


@dataclass(frozen=True)
class Tuned:
    """What training came to.

    Attributes:
        model: In eval mode; merged where an adapter was trained.
        losses: Of the trainer's log, in order.
        steps: Optimizer steps, those before a resume included.
        n_frozen: Entries of the trained parameters that were held still.
        n_trained: All entries of the trained parameters.
        cut: Conversations that were longer than `max_length`.
    """

    model: CausalLM
    losses: tuple[float, ...]
    steps: int
    n_frozen: int
    n_trained: int
    cut: int


def finetune(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    target: Path,
    *,
    freeze: UnitFreeze | None = None,
    config: FinetuneConfig | None = None,
    resume: bool = False,
) -> Tuned:
    """Train, and write the model to `target`, its checkpoints to `target`/checkpoints.

    Args:
        model: Changed in place.
        tokenizer: Its tokenizer, saved beside the model.
        conversations: With responses.
        target: Directory.
        freeze: What is held still; None for nothing.
        config: See `FinetuneConfig`.
        resume: Go on from the last checkpoint in `target`.

    Raises:
        ConfigurationError: Nothing to resume from, another run's weights, or a package that
            is not installed.
        DataError: No conversation leaves a token to learn.
    """
    config = config or FinetuneConfig()
    trainer, cut = trainer_for(
        model, tokenizer, conversations, target, freeze=freeze, config=config
    )
    trained: Any = trainer.model
    last = _last_checkpoint(target) if resume else None
    trainer.train(resume_from_checkpoint=last)
    frozen = 0 if freeze is None else freeze.n_frozen(trained)
    n_trained = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    if config.lora_rank:
        trained.save_pretrained(target / "adapter")
        trained = trained.merge_and_unload()
    trained.save_pretrained(target)
    tokenizer.save_pretrained(target)
    log = trainer.state.log_history
    losses = tuple(float(entry["loss"]) for entry in log if "loss" in entry)
    return Tuned(trained.eval(), losses, trainer.state.global_step, frozen, n_trained, cut)


def trainer_for(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    target: Path,
    *,
    freeze: UnitFreeze | None,
    config: FinetuneConfig,
) -> tuple[Trainer, int]:
    """Return a trainer that holds `freeze` still, and how many conversations were cut."""
    _require("accelerate", "fine-tuning")
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rows = encode_for_training(model, tokenizer, conversations, max_length=config.max_length)
    cut = sum(len(row["input_ids"]) == config.max_length for row in rows)
    device = next(model.parameters()).device
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    arguments = TrainingArguments(
        output_dir=str(target / "checkpoints"),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_share,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        save_strategy="steps" if config.save_steps else "epoch",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_steps=1,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device.type == "cpu",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    trained: Any = _with_adapter(model, config) if config.lora_rank else model
    trainer = Trainer(
        model=trained,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batch: pad_batch(batch, pad),
        callbacks=[] if freeze is None else [freeze],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for results
    return trainer, cut


def encode_for_training(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    max_length: int,
) -> list[dict[str, list[int]]]:
    """Turn conversations into ids and labels; the prompt carries no loss.

    Raises:
        DataError: No conversation leaves a token to learn.
    """
    stops = sorted(stop_ids(model, tokenizer))
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in stops else next(iter(stops), None)
    rows = []
    for conversation in conversations:
        encoded = encode_response(tokenizer, conversation)
        ids = [*encoded.ids, *([] if end is None else [end])][:max_length]
        labels = [_IGNORED] * min(encoded.turn_start, len(ids)) + ids[encoded.turn_start :]
        if len(ids) > encoded.turn_start:
            rows.append({"input_ids": ids, "labels": labels})
    if not rows:
        raise DataError(
            f"none of {len(conversations)} conversations has a response within max_length="
            f"{max_length}; pass conversations with responses, or raise it."
        )
    return rows


def pad_batch(batch: Sequence[Mapping[str, Sequence[int]]], pad: int) -> dict[str, Tensor]:
    """Pad on the right to the longest row.

    Returns:
        input_ids, attention_mask and labels, each [batch, seq] int64.
    """
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(name: str, value: int) -> Tensor:
        rows = [[*row[name], *[value] * (longest - len(row[name]))] for row in batch]
        return torch.tensor(rows)

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
    return {
        "input_ids": padded("input_ids", pad),
        "attention_mask": torch.tensor(mask),
        "labels": padded("labels", _IGNORED),
    }


def _with_adapter(model: CausalLM, config: FinetuneConfig) -> CausalLM:
    _require("peft", "LoRA")
    import peft

    torch.manual_seed(config.seed)
    with warnings.catch_warnings():
        # peft still reads a name that transformers has renamed.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing")
        settings = peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules="all-linear",
            # Conv1D of GPT-2 stores [in, out].
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
            task_type="CAUSAL_LM",
        )
        bare: Any = model  # peft states its own classes
        adapted: Any = peft.get_peft_model(bare, settings)
    return cast("CausalLM", adapted)


def _last_checkpoint(target: Path) -> str:
    from transformers.trainer_utils import get_last_checkpoint

    folder = target / "checkpoints"
    found: Any = None
    if folder.is_dir():
        found = get_last_checkpoint(str(folder))  # type: ignore[no-untyped-call]
    if found is None:
        raise ConfigurationError(
            f"{folder} holds no checkpoint to resume from; begin without resume."
        )
    return str(found)


def _require(package: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigurationError(
            f"{purpose} needs {package}, which is not installed; run "
            "`pip install 'safe-decode[training]'`."
        )
