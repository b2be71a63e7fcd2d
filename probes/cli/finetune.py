"""`safe-decode finetune`: train a model on conversations, some of its units held still.

Knows the options and how the outcome is shown. Does not know training or freezing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json, working, write_text
from safe_decode.cli.loading import loaded_model
from safe_decode.cli.options import Device, JsonOptions, ModelName
from safe_decode.cli.tables import WordTable, print_table
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.loading import LoadSettings

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.finetuning.finetune import FinetuneConfig, Tuned
    from probes.finetuning.freeze import UnitFreeze

__all__ = ["finetune"]


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(JsonOptions):
    """Options of `safe-decode finetune`."""

    data: Annotated[
        Path, typer.Option(help="Conversations with responses to train on, as JSON lines.")
    ]
    out: Annotated[
        Path, typer.Option(help="Directory that the trained model and checkpoints are written to.")
    ]
    model: ModelName = None
    freeze: Annotated[
        Path | None,
        typer.Option(
            help="File of units located on this model, written by `safe-decode locate`. Without "
            "it: nothing is frozen."
        ),
    ] = None
    setting: Annotated[
        Literal["scu", "i", "ii", "redundant"],
        typer.Option(
            help="Which units of --freeze are frozen. scu: the safety-critical ones; i: those and "
            "the top 6 % of the complex ones; ii: the safety-critical ones and all complex ones; "
            "redundant: all but the redundant ones."
        ),
    ] = "i"
    random_control: Annotated[
        int | None,
        typer.Option(
            help="Freeze random units instead, as many in each layer and of each kind, drawn with "
            "this seed."
        ),
    ] = None
    epochs: Annotated[float, typer.Option(help="Passes over the conversations.")] = 1.0
    learning_rate: Annotated[
        float, typer.Option(help="Highest learning rate of the cosine schedule.")
    ] = 2e-5
    batch_size: Annotated[int, typer.Option(help="Conversations in each forward pass.")] = 8
    accumulation: Annotated[
        int, typer.Option(help="Forward passes whose gradients one optimiser step sums.")
    ] = 1
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0
    max_length: Annotated[
        int, typer.Option(help="Longest conversation, in tokens; longer ones are cut.")
    ] = 1024
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16 instead of float32.")
    ] = False
    lora_rank: Annotated[
        int, typer.Option(help="Rank of the LoRA adapter that is trained. 0: train all weights.")
    ] = 0
    lora_alpha: Annotated[
        int, typer.Option(help="Scale of the LoRA adapter, as lora_alpha of peft.")
    ] = 16
    save_steps: Annotated[
        int,
        typer.Option(help="Optimiser steps between checkpoints. 0: one checkpoint each epoch."),
    ] = 0
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the copy of frozen weights on the CPU.")
    ] = False
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the last checkpoint in the directory --out."),
    ] = False
    seed: Annotated[
        int, typer.Option(help="Seed of the order of conversations and of the adapter.")
    ] = 0
    device: Device = "cpu"


@command("Fine-tune")
def finetune(options: FinetuneOptions) -> None:
    """Fine-tune a model while its safety-critical units stay bit for bit what they were."""
    rows, out = _conversations(options.data), options.out
    _require_target(out, resume=options.resume)
    from probes.finetuning.finetune import finetune as tune

    config = _config(options)
    held = _freeze(options)
    # Training steps are too small for narrower weights; --bf16 computes over these.
    loaded = loaded_model(options.model, LoadSettings(device=options.device, dtype="float32"))
    with working("Training"):
        tuned = tune(
            loaded.model,
            loaded.tokenizer,
            rows,
            out,
            freeze=held,
            config=config,
            resume=options.resume,
        )
    frozen = {"setting": options.setting, "random": options.random_control}
    record = {
        "model": options.model or "embedded, aligned",
        "data": options.data.name,
        "freeze": None if options.freeze is None else frozen,
        "config": asdict(config),
        **_told(tuned),
    }
    _write_record(out, record)
    if options.as_json:
        print_json({"out": str(out), **record})
    else:
        _show(record, out)


def _config(options: FinetuneOptions) -> FinetuneConfig:
    from probes.finetuning.finetune import FinetuneConfig

    return FinetuneConfig(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        weight_decay=options.weight_decay,
        max_length=options.max_length,
        bf16=options.bf16,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        save_steps=options.save_steps,
        seed=options.seed,
    )


def _conversations(path: Path) -> list[Conversation]:
    from probes.data.conversations import read_jsonl

    rows = [row for row in read_jsonl(path) if row.response]
    if not rows:
        raise DataError(f"{path} holds no conversation with a response; pass some to learn from.")
    return rows


def _require_target(out: Path, *, resume: bool) -> None:
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise ConfigurationError(
            f"{out} is not empty; pass another directory, or --resume to go on with its run."
        )
    if not out.parent.is_dir():
        raise ConfigurationError(f"{out} cannot be made; pass a directory in one that exists.")
    out.mkdir(exist_ok=True)


def _freeze(options: FinetuneOptions) -> UnitFreeze | None:
    if options.freeze is None:
        if options.random_control is not None:
            raise ConfigurationError(
                "--random-control was given without --freeze; pass the units that the lot matches."
            )
        return None
    from probes.finetuning.presets import freeze_of
    from probes.location.units import UnitSet

    return freeze_of(
        UnitSet.load(options.freeze),
        options.setting,
        random_seed=options.random_control,
        offload=options.offload,
    )


def _told(tuned: Tuned) -> dict[str, Any]:
    return {
        "steps": tuned.steps,
        "first_loss": tuned.losses[0] if tuned.losses else None,
        "last_loss": tuned.losses[-1] if tuned.losses else None,
        "trained_entries": tuned.n_trained,
        "frozen_entries": tuned.n_frozen,
        "cut_conversations": tuned.cut,
    }


def _write_record(out: Path, record: dict[str, Any]) -> None:
    import json

    write_text(out / "finetune.json", json.dumps(record, indent=2) + "\n")


def _show(record: dict[str, Any], out: Path) -> None:
    rows = []
    for name in ("steps", "first_loss", "last_loss"):
        value = record[name]
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        rows.append((name.replace("_", " "), text))
    frozen, trained = record["frozen_entries"], record["trained_entries"]
    held = f"{frozen:,} of {trained:,} trained entries ({frozen / trained:.1%})"
    rows.append(("held still", held))
    print_table(WordTable(("", ""), rows, "Fine-tuning"))
    console().print(f"model: {out}", soft_wrap=True)
