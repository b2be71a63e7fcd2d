"""`safe-decode finetune`: train a model on conversations, some of its units held still.

Knows the options and how the outcome is shown. Does not know training or freezing.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safe_decode.cli.console import console, print_json, working, write_text
from safe_decode.cli.generate import Device, ModelName
from safe_decode.cli.options import loaded_model
from safe_decode.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.finetuning.finetune import Tuned
    from probes.finetuning.freeze import UnitFreeze

__all__ = ["finetune"]


def finetune(
    data: Annotated[Path, typer.Option(help="Conversations with responses as JSON lines.")],
    out: Annotated[Path, typer.Option(help="Directory of the trained model and checkpoints.")],
    model: ModelName = None,
    freeze: Annotated[
        Path | None, typer.Option(help="Units located on this model; default nothing is frozen.")
    ] = None,
    setting: Annotated[
        Literal["scu", "i", "ii", "redundant"],
        typer.Option(
            help="What is frozen: safety-critical units; i: and the top 6 % of the complex; ii: "
            "and all complex; redundant: all but the redundant units."
        ),
    ] = "i",
    random_control: Annotated[
        int | None,
        typer.Option(help="Seed of a lot that draws as many units of each layer and kind instead."),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Peak of a cosine schedule.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(help="Conversations a forward.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Forwards a step.")] = 1,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    max_length: Annotated[int, typer.Option(help="Tokens of a conversation.")] = 1024,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    lora_rank: Annotated[int, typer.Option(help="Train an adapter of this rank; 0: in full.")] = 0,
    lora_alpha: Annotated[int, typer.Option(help="Scale of the adapter times its rank.")] = 16,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; 0: an epoch.")] = 0,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the copy of frozen weights on the CPU.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order and the adapter.")] = 0,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fine-tune a model while its safety-critical units stay bit for bit what they were."""
    rows = _conversations(data)
    _require_target(out, resume=resume)
    from probes.finetuning.finetune import FinetuneConfig
    from probes.finetuning.finetune import finetune as tune

    config = FinetuneConfig(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        weight_decay=weight_decay,
        max_length=max_length,
        bf16=bf16,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        save_steps=save_steps,
        seed=seed,
    )
    held = _freeze(freeze, setting, random_control, offload=offload)
    loaded = loaded_model(model, device, "float32")
    with working("Training"):
        tuned = tune(
            loaded.model,
            loaded.tokenizer,
            rows,
            out,
            freeze=held,
            config=config,
            resume=resume,
        )
    record = {
        "model": model or "embedded, aligned",
        "data": data.name,
        "freeze": None if freeze is None else {"setting": setting, "random": random_control},
        "config": asdict(config),
        **_told(tuned),
    }
    _write_record(out, record)
    if as_json:
        print_json({"out": str(out), **record})
    else:
        _show(record, out)


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


def _freeze(
    path: Path | None,
    setting: Literal["scu", "i", "ii", "redundant"],
    random_control: int | None,
    *,
    offload: bool,
) -> UnitFreeze | None:
    if path is None:
        if random_control is not None:
            raise ConfigurationError(
                "--random-control was given without --freeze; pass the units that the lot matches."
            )
        return None
    from probes.finetuning.presets import freeze_of
    from probes.location.units import UnitSet

    units = UnitSet.load(path)
    return freeze_of(units, setting, random_seed=random_control, offload=offload)


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
    from rich.table import Table

    table = Table(title="Fine-tuning", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name in ("steps", "first_loss", "last_loss"):
        value = record[name]
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), text)
    frozen, trained = record["frozen_entries"], record["trained_entries"]
    table.add_row(
        "held still", f"{frozen:,} of {trained:,} trained entries ({frozen / trained:.1%})"
    )
    screen = console()
    screen.print(table)
    screen.print(f"model: {out}", soft_wrap=True)
