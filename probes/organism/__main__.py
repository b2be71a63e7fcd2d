"""`python -m probes.organism`: retrain the embedded pair and its bundle, or parts of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from safe_decode.whole_files import write_whole

app = typer.Typer(add_completion=False, no_args_is_help=False, help=__doc__)

ARTEFACTS = Path(__file__).parents[2] / "safe_decode" / "demo" / "artefacts"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

Target = Annotated[Path, typer.Option(help="Where the models and the bundle are written.")]
Seed = Annotated[int, typer.Option(help="Of text, initial weights and order.")]
Fold = Annotated[int, typer.Option(help="Which third of the harm categories stays unseen.")]


def _say(line: str) -> None:
    logging.getLogger("probes.organism").info(line)


@app.callback(invoke_without_command=True)
def everything(
    context: typer.Context, target: Target = ARTEFACTS, seed: Seed = 0, fold: Fold = 0
) -> None:
    """Train the pair, make the bundle, and write the demo's prompts: all of it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if context.invoked_subcommand is None:
        pair(target=target, seed=seed)
        bundle(target=target, seed=seed, fold=fold, model=None, prompts=True)


@app.command()
def pair(
    target: Target = ARTEFACTS,
    seed: Seed = 0,
    tokens: Annotated[int | None, typer.Option(help="Pretraining tokens.")] = None,
    recovery: Annotated[float, typer.Option(help="Above 0: a deep control.")] = 0.0,
) -> None:
    """Train the unaligned and the aligned model."""
    from probes.organism.curriculum import Amounts, build_pair

    amounts = Amounts() if tokens is None else Amounts(pretraining_tokens=tokens)
    target.mkdir(parents=True, exist_ok=True)
    build_pair(target, seed=seed, amounts=amounts, say=_say, recovery=recovery)


@app.command()
def bundle(
    target: Target = ARTEFACTS,
    seed: Seed = 0,
    fold: Fold = 0,
    model: Annotated[
        Path | None, typer.Option(help="The aligned model; default that in TARGET.")
    ] = None,
    prompts: Annotated[bool, typer.Option(help="Make the demo's held-out prompts too.")] = True,
    long: Annotated[
        bool, typer.Option("--long", help="Fit and certify on long begun answers as well.")
    ] = False,
) -> None:
    """Make the probe bundle of the aligned model, and the demo's held-out prompts."""
    from probes.organism.build import build_bundle, build_prompts
    from probes.organism.curriculum import Amounts
    from safe_decode.loading import load_model

    loaded = load_model(model or target / "aligned")
    target.mkdir(parents=True, exist_ok=True)
    made = build_bundle(
        loaded.model,
        loaded.tokenizer,
        seed=9000 + seed,
        fold=fold,
        amounts=Amounts(long_answers=1200 if long else 0),
        say=_say,
    )
    made.bundle.save(target / "bundle")
    if prompts:
        build_prompts(
            target / "prompts.jsonl",
            loaded.model,
            loaded.tokenizer,
            seed=77_000 + seed,
            fold=fold,
            amounts=Amounts(),
        )
    for line in made.tried[:4]:
        _say(json.dumps(line))


@app.command()
def card(target: Target = ARTEFACTS) -> None:
    """Write docs/results/embedded-pair.md and its learning curve from what was measured."""
    from probes.organism.model_card import card_text, write_curve

    docs = RESULTS.parents[1] / "docs" / "results"
    text = card_text(RESULTS / "organism.jsonl", target / "aligned")
    write_whole(docs / "embedded-pair.md", text)
    if (target / "curve.jsonl").exists():
        write_curve(target / "curve.jsonl", docs / "embedded-pair-curve.png")


@app.command()
def measure(
    target: Target = ARTEFACTS,
    seed: Seed = 0,
    n: Annotated[int, typer.Option(help="Prompts a cell.")] = 500,
    out: Annotated[Path, typer.Option(help="JSON lines, appended.")] = RESULTS / "organism.jsonl",
) -> None:
    """Count what both models do in every cell, and append it to a results file."""
    from probes.organism.measure import measure as cells
    from safe_decode.loading import load_model

    lines = []
    for name in ("aligned", "unaligned"):
        loaded = load_model(target / name)
        for outcome in cells(loaded.model, loaded.tokenizer, n=n, seed=31_000 + seed):
            row = {"study": "organism", "model": name, "seed": seed, **outcome.to_json()}
            lines.append(json.dumps(row))
            _say(lines[-1])
    with out.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    app()
