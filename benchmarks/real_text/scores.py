"""Score whole responses with many probes in one pass: `python -m benchmarks.real_text.scores`.

What is kept is one logit a token and probe, not the activations. Start it once a core.

Knows probes as a file of weights, rows and shards. Does not know statistics over time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.real_text.candidates import TWO_CLASS
from benchmarks.real_text.harvest import load_shallow
from benchmarks.real_text.parts import StudyRow, sampled, study_rows
from benchmarks.real_text.windows import cut
from benchmarks.real_text.workplace import claim, parser_of
from probes.activations.teacher_forcing import teacher_forced
from safe_decode.activations.site import Site
from safe_decode.probe.linear import LinearProbe

__all__ = ["deployable_probe", "joint_probe", "main", "read_scores", "scored_rows"]

TOKENS = 1024
_SHARES = {
    "alpaca-52k": 0.5,
    "safety-tuned-llamas": 0.4,
    "own harmful-prefill-3": 0.0,
    "own harmful-prefill-1": 0.5,
    "own harmful-prefill-9": 0.5,
    "own harmful-prefilled-long": 0.4,
}
_LONG = 0.8
"""Of the long benign answers that certify."""
_ROWS = 64


def scored_rows(data: Path) -> list[StudyRow]:
    """List what is scored, in the order of need: select, dev, then what certifies."""
    kept = []
    for row in study_rows(data):
        if not row.conversation.response.strip() or row.part in ("fit", "other"):
            continue
        is_long = row.name.startswith("long")
        if row.part == "select":
            share = 0.6 if row.source in TWO_CLASS or is_long else _SHARES.get(row.source, 1.0)
        elif row.part == "certify" and is_long:
            share = _LONG
        else:
            share = _SHARES.get(row.source, 1.0)
        kept += [row] if sampled(row.group, share) else []
    order = {"select": 0, "dev": 1, "certify": 2}

    def place(row: StudyRow) -> tuple[int, bool, str]:
        # Long written answers certify last: they are the dearest.
        return (
            order[row.part],
            row.part == "certify" and row.name.startswith("long"),
            row.group[::-1],
        )

    return sorted(kept, key=place)


def joint_probe(path: Path) -> LinearProbe:
    """Read a file of weights as one probe with a head a candidate."""
    with np.load(path) as file:
        sites = tuple(
            Site(one["layer"], one["kind"], tuple(one["channels"]))
            for one in json.loads(str(file["sites"]))
        )
        weight, bias = torch.from_numpy(file["weight"]), torch.from_numpy(file["bias"])
        return LinearProbe(sites, weight.float(), bias.float(), tuple(file["names"].tolist()))


def deployable_probe(path: Path, head: str) -> LinearProbe:
    """Take one head of the study's file of weights, with the channels that it reads."""
    joint = joint_probe(path)
    place = joint.heads.index(head)
    weight = joint.weight[:, place]
    sites, kept, start = [], [], 0
    for site in joint.sites:
        own = weight[start : start + len(site.channels)]
        used = torch.nonzero(own).flatten()
        if len(used):
            channels = tuple(site.channels[int(one)] for one in used)
            sites.append(Site(site.layer, site.kind, channels))
            kept.append(own[used])
        start += len(site.channels)
    return LinearProbe(
        tuple(sites), torch.cat(kept)[:, None], joint.bias[place : place + 1], ("harm",)
    )


def read_scores(directory: Path) -> dict[int, NDArray[np.float32]]:
    """Return the logits of the rows that are done, [T + 1, K] each, by place."""
    found: dict[int, NDArray[np.float32]] = {}
    for path in sorted(directory.glob("[0-9]*.npz")):
        with np.load(path) as file:
            found |= {int(name): file[name] for name in file.files}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Score the shards that nobody has taken."""
    arguments = parser_of(__doc__, has_model=True).parse_args(argv)
    torch.set_num_threads(1)
    loaded, probe = load_shallow(arguments.model), joint_probe(arguments.work / "probes.npz")
    rows = scored_rows(arguments.data)
    encoded = cut(loaded, [row.conversation for row in rows], TOKENS)
    folder = arguments.work / "scores"
    folder.mkdir(exist_ok=True)
    for number, begin in enumerate(range(0, len(rows), _ROWS)):
        finished = folder / f"{number:05d}.npz"
        if not claim(finished):
            continue
        found: dict[str, Any] = {}
        part = encoded[begin : begin + _ROWS]
        for batch in teacher_forced(
            loaded.model, probe.sites, part, description="scoring", tokens_per_batch=2048
        ):
            scored = batch._replace(features=probe(batch.features))
            for index, row in enumerate(batch.rows):
                found[str(begin + row)] = scored.of(index).numpy().copy()
        temporary = folder / f"{number:05d}.part"
        with temporary.open("wb") as file:
            np.savez(file, **found)
        os.replace(temporary, finished)


if __name__ == "__main__":
    main()
