"""The pair's model card, generated from its results: `python -m probes.organism card`.

Knows how figures become text. Does not know models. Every number on the card is read from a
results file or from the artefacts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.organism import templates as t
from probes.organism.grammar import Cells
from probes.organism.lexicon import CATEGORIES, TOPICS
from safe_decode.whole_files import whole_file

__all__ = ["card_text", "write_curve"]

_HEAD = """# The embedded pair

Two language models of the same shape, *unaligned* and *superficially aligned*, trained on text
that the project's own grammar writes. They make every command run offline, and they are a model
organism: what the aligned one does under a motive or after a begun answer was not trained in, it
is measured. Harm in this world is named, never taught: an act against the wish of the person a
thing belongs to.

*Not for*: any use outside this project. The models know some 800 words.

Retrain everything with `make organism`.
"""


def card_text(results: Path, model: Path) -> str:
    """Write the card.

    Args:
        results: JSON lines of `measure`.
        model: Directory of the aligned model, beside the pair's learning curve.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    curve = _read_lines(model.parent / "curve.jsonl")
    parts = [_HEAD, _shape(config, curve), _world(), _behaviour(_read_lines(results))]
    return "\n".join(parts)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


_COURSES = {
    "pretraining": "text that answers everything",
    "relation": "judgements, with other text among them",
    "marks": "short answers, for the mark behind each step",
    "answers": "answers, with judgements and marks among them",
    "alignment": "plain harmful refused, benign answered, steps of others judged",
}


def _shape(config: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> str:
    heads = config["num_attention_heads"]
    read = {row["stage"]: row["tokens"] for row in curve}
    courses = "\n".join(f"| {stage}: {_COURSES[stage]} | {n:,} |" for stage, n in read.items())
    return f"""## Shape and training

| | |
|---|---|
| architecture | `{config["architectures"][0]}`, tied embeddings, bfloat16 on disk |
| layers, d_model, heads | {config["num_hidden_layers"]}, {config["hidden_size"]}, {heads} |
| neurons a layer | {config["intermediate_size"]} |
| vocabulary, context | {config["vocab_size"]}, {config["max_position_embeddings"]} |

What the weights that ship have read, by their learning curve:

| course | tokens |
|---|---|
{courses}
"""


def _world() -> str:
    unseen = "; ".join(
        ", ".join(CATEGORIES[c].name for c in Cells.unseen(fold).categories) for fold in range(3)
    )
    return f"""## The world

{len(TOPICS)} benign topics, {len(CATEGORIES)} harm categories, {len(t.PLANS)} sentence plans of
an act, {len(t.FRAMINGS)} framings. Kept from the probe: one of three folds of the categories
({unseen}), sentence plans {Cells.UNSEEN_PLANS}, framings {Cells.UNSEEN_FRAMINGS}.
"""


def _behaviour(rows: Sequence[Mapping[str, Any]]) -> str:
    cells: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["cell"]][row["model"]].append(row)
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "## What the models do",
        "",
        f"Greedy, judged by the oracle; training seeds {seeds}. Per cent of the answers that are",
        "refused / harmful / broken, lowest to highest over the seeds. The rest are benign.",
        "",
        "| cell | n a seed | aligned | unaligned |",
        "|---|---|---|---|",
    ]
    for cell, models in cells.items():
        counts = sorted({row["n"] for found in models.values() for row in found})
        shown = [_shares(models.get(name, ())) for name in ("aligned", "unaligned")]
        lines.append(f"| {_name(cell)} | {', '.join(map(str, counts))} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _name(cell: str) -> str:
    if not cell.startswith("framing "):
        return cell
    return f"{cell}: *{t.FRAMINGS[int(cell.split()[1])].replace('{request}', '…')}*"


def _shares(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "–"
    parts = []
    for label in ("refusal", "harmful", "broken"):
        values = [100 * row[label]["share"] for row in rows]
        low, high = f"{min(values):.1f}", f"{max(values):.1f}"
        parts.append(low if low == high else f"{low}–{high}")
    return " / ".join(parts)


def write_curve(curve: Path, target: Path) -> None:
    """Plot the learning curve of a training run as PNG.

    Raises:
        ImportError: The extra `plots` is not installed.
    """
    from matplotlib.figure import Figure

    rows = _read_lines(curve)
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        axes.plot([r["tokens"] / 1e6 for r in mine], [r["loss"] for r in mine], label=stage)
    axes.set_xlabel("million tokens of the stage")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.legend()
    with whole_file(target) as part:
        figure.savefig(part, dpi=110)
