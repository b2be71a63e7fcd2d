"""What a recipe's sources hold: labelled responses and requests, each in its split.

Knows groups, draws by hash and which split a row may stand in. Does not know models, or what is
enough.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from probes.building.recipe import BuildRecipe, Source
from probes.data.conversations import Conversation, split_of
from probes.data.near_duplicates import merge_near_duplicates
from probes.data.reader import Reading, read_conversations
from probes.rollouts.framings import Wrapping, wrapped
from probes.rollouts.types import Request, requests_of
from safe_decode.errors import DataError

__all__ = ["OWN_ANSWERS", "Material", "gathered"]

OWN_ANSWERS = "own answers"
"""Source of what the model answers, in figures."""
_HUB = "hf:"


@dataclass(frozen=True)
class Material:
    """Rows of all sources, in their splits.

    Attributes:
        labelled: Judged responses that others wrote; of fit, select or test.
        requests: What the model is asked; of any split. One a group.
        readings: Of each source.
        report: JSON: what was drawn, merged and left out.
    """

    labelled: tuple[Conversation, ...]
    requests: tuple[Request, ...]
    readings: tuple[Reading, ...]
    report: dict[str, Any]

    @property
    def digest(self) -> str:
        """Sha256 of everything that is fitted on or asked."""
        records = [asdict(row) for row in self.labelled] + [asdict(row) for row in self.requests]
        text = "\n".join(json.dumps(record, sort_keys=True) for record in records)
        return hashlib.sha256(text.encode()).hexdigest()


def gathered(recipe: BuildRecipe, folder: Path) -> Material:
    """Read the sources, merge near duplicates, draw and split.

    Everything depends on hashes of groups and the seed alone: rows that are added move no other
    row to another split.

    Args:
        recipe: What is read.
        folder: Directory that the recipe's files are relative to.

    Raises:
        DataError: A source cannot be read, or none holds a row of use.
    """
    readings, labelled, prompts = [], [], []
    for source in recipe.sources:
        reading = read_conversations(_place(source, folder), columns=source.columns)
        readings.append(reading)
        rows = _drawn(_labelled_by_origin(source, reading), source.rows, recipe.seed)
        if "labelled" in source.use:
            labelled += [row for row in rows if row.response and row.response_harmful is not None]
        if "prompts" in source.use:
            prompts += rows
    if not labelled and not prompts:
        raise DataError(
            f"none of {sum(one.rows for one in readings)} rows is a judged response or a prompt; "
            "look at `use` and `columns` of the recipe's sources."
        )
    merged = merge_near_duplicates([*labelled, *prompts])
    labelled = merged.conversations[: len(labelled)]
    asked = _asked(merged.conversations[len(labelled) :], recipe)
    homes = {row.group: row.split for row in asked}
    kept = [
        row for row in _split(labelled, homes, recipe) if row.split in ("fit", "select", "test")
    ]
    report = {
        "sources": [one.to_json() for one in readings],
        "near_duplicates": merged.to_json(),
        "labelled": len(kept),
        "labelled_left_out": len(labelled) - len(kept),
        "asked": dict(Counter("harmful" if row.prompt_harmful else "benign" for row in asked)),
        "seed": recipe.seed,
    }
    return Material(tuple(kept), tuple(_requests(asked, recipe)), tuple(readings), report)


def _place(source: Source, folder: Path) -> str:
    return source.data if source.data.startswith(_HUB) else str(folder / source.data)


def _labelled_by_origin(source: Source, reading: Reading) -> list[Conversation]:
    """Give rows the labels of their source where they have none, and its name."""
    rows = []
    for row in (*reading.conversations, *reading.prompts):
        labels: dict[str, Any] = {}
        if row.prompt_harmful is None and source.prompt_harmful is not None:
            labels["prompt_harmful"] = source.prompt_harmful
        if row.response and row.response_harmful is None and source.response_harmful is not None:
            labels["response_harmful"] = source.response_harmful
        name = Path(source.data).name.partition(".")[0]
        # A split that the source gives is the source's business: ours are drawn.
        rows.append(replace(row, split=None, meta={"source": name, **row.meta}, **labels))
    return rows


def _drawn(rows: Sequence[Conversation], most: int | None, seed: int) -> list[Conversation]:
    """Keep the first rows by a hash of their group, in the order of the source."""
    if most is None or len(rows) <= most:
        return list(rows)
    order = sorted(range(len(rows)), key=lambda place: (_draw(rows[place].group, seed), place))
    return [rows[place] for place in sorted(order[:most])]


def _draw(group: str, seed: int) -> bytes:
    # Apart from the hash that splits: the first rows by that one are all of one split.
    return hashlib.blake2b(f"{seed}\x1fdrawn\x1f{group}".encode(), digest_size=8).digest()


def _asked(prompts: Iterable[Conversation], recipe: BuildRecipe) -> list[Conversation]:
    """Choose prompts, one a group: a group is one draw of a certificate."""
    first = {row.group: row for row in reversed(list(prompts)) if row.prompt_harmful is not None}
    order = sorted(first.values(), key=lambda row: _draw(row.group, recipe.seed))
    chosen = []
    for is_harmful, most in ((False, recipe.answers.benign), (True, recipe.answers.harmful)):
        chosen += [row for row in order if row.prompt_harmful is is_harmful][:most]
    shares = recipe.splits.asked
    return [
        replace(row, split=split_of(row.group, seed=recipe.seed, shares=shares)) for row in chosen
    ]


def _split(
    rows: Iterable[Conversation], homes: dict[str, Any], recipe: BuildRecipe
) -> list[Conversation]:
    """Give labelled rows the split of their group: that of its prompt where it is asked."""
    shares, seed = recipe.splits.labelled, recipe.seed
    return [
        replace(row, split=homes.get(row.group) or split_of(row.group, seed=seed, shares=shares))
        for row in rows
    ]


def _requests(asked: Sequence[Conversation], recipe: BuildRecipe) -> list[Request]:
    # A beginning of the answer that a prompt brings along stays.
    requests = [
        replace(one, meta={**one.meta, "source": OWN_ANSWERS}) for one in requests_of(asked)
    ]
    wrapping = Wrapping(
        framed=recipe.answers.framed, prefilled=recipe.answers.prefilled, seed=recipe.seed
    )
    return wrapped(requests, wrapping)
