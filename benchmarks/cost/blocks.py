"""Short calls by turns, kept as they end, until they can tell or the time is up.

Knows arms, the file that keeps their calls, when a ratio is settled, and how scores of two arms
are compared. Does not know models or what is printed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from safe_decode.bench.arms import Arm, Lap
from safe_decode.bench.runner import undisturbed
from safe_decode.bench.statistics import MedianInterval, interval_of

__all__ = ["Calls", "Settled", "compared", "ratio_of", "run_rounds"]

Laps = dict[str, list[Lap]]


class Calls:
    """Every call of a study, in a file that is only ever added to.

    Args:
        path: Made where it is not there.
        study: What is measured; calls of another study in the same file are left alone.
    """

    def __init__(self, path: Path, study: str) -> None:
        self._path, self._study = path, study
        path.parent.mkdir(parents=True, exist_ok=True)

    def of(self, name: str) -> Laps:
        """Return the calls of a configuration, whole rounds alone."""
        kept: Laps = {}
        for line in self._lines(name):
            for arm, lap in line.get("laps", {}).items():
                kept.setdefault(arm, []).append(Lap(**{**lap, **_tuples(lap)}))
        return kept

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a configuration that is finished; none if it is not."""
        found: list[dict[str, Any]] = []
        for line in self._lines(name):
            found = line.get("rows", found)
        return found

    def keep(self, name: str, laps: Mapping[str, Lap]) -> None:
        """Keep one round."""
        self._add(name, laps={arm: asdict(lap) for arm, lap in laps.items()})

    def finish(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the rows of a configuration that needs no more rounds."""
        self._add(name, rows=list(rows))

    def _add(self, name: str, **told: object) -> None:
        line = {"study": self._study, "configuration": name, **told}
        with self._path.open("a", encoding="utf-8") as file:
            # On a line of its own, whatever a run that was cut off has left of its last one.
            file.write("\n" + json.dumps(line) + "\n")
            file.flush()

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            # The last line may be half of one, where a run was cut off.
            try:
                read = json.loads(line)
            except json.JSONDecodeError:
                continue
            if read["study"] == self._study and read["configuration"] == name:
                yield read


def _tuples(lap: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(lap[name]) for name in ("steps", "device_steps")}


@dataclass(frozen=True)
class Settled:
    """When a ratio can be told.

    Attributes:
        within: Half the width of its 95 % interval is no more than this.
        at_least: Rounds before it is looked at.
    """

    within: float = 0.01
    at_least: int = 8

    def by(self, laps: Laps) -> bool:
        """Say whether the calls so far settle guard over bare."""
        if len(laps.get("bare", ())) < self.at_least:
            return False
        found = ratio_of(laps, "guard")
        return (found.high - found.low) / 2 <= self.within


def ratio_of(laps: Laps, arm: str) -> MedianInterval:
    """An arm's time a token over that of "bare", by the device's clock where there is one."""
    mine, bare = (
        np.array([np.median(lap.device_steps or lap.steps) for lap in laps[name]])
        for name in (arm, "bare")
    )
    return interval_of(mine / bare)


def run_rounds(
    arms: Mapping[str, Arm],
    options: dict[str, Any],
    kept: Laps,
    calls: Calls,
    name: str,
    *,
    settled: Settled,
    rounds: int,
    until: float,
    now: Callable[[], float] = time.monotonic,
) -> str:
    """Run rounds until they can tell, and add them to `kept`.

    Args:
        arms: By name, each called once a round, every round beginning with another.
        options: For `generate`.
        kept: Laps so far, by arm; changed.
        calls: Keeps each round.
        name: Of the configuration.
        settled: When to stop.
        rounds: At most so many, those in `kept` included.
        until: When the time is up, by `now`; two rounds run in any case.
        now: A clock in seconds.

    Returns:
        Why it stopped: "settled", "rounds" or "time".
    """
    names = list(arms)
    while True:
        done = len(kept.get("bare", ()))
        if settled.by(kept):
            return "settled"
        if done >= max(2, rounds):
            return "rounds"
        if done >= 2 and now() >= until:
            return "time"
        turn = done % len(names)
        with undisturbed():
            laps = {arm: arms[arm].lap(options) for arm in names[turn:] + names[:turn]}
        calls.keep(name, laps)
        for arm, lap in laps.items():
            kept.setdefault(arm, []).append(lap)


class _Recorded(Protocol):
    """Output of `generate` with the scores as the model made them."""

    sequences: Tensor
    logits: tuple[Tensor, ...]


def compared(arms: Mapping[str, Arm], options: dict[str, Any]) -> dict[str, dict[str, object]]:
    """Compare scores and ids of every arm with those of "bare", in one call each.

    Returns:
        By arm but "bare": whether ids are the same, in how many rows they are, the largest
        difference of scores before ids part, and in how many rows the two largest scores of bare
        tie where they do, or anywhere if they do not part.
    """
    options = {**options, "return_dict_in_generate": True, "output_logits": True}
    width = options["input_ids"].shape[1]
    found = {}
    bare: Any = arms["bare"].call(**options)
    for name, arm in arms.items():
        if name == "bare":
            continue
        output: Any = arm.call(**options)
        other = getattr(output, "generation", output)
        found[name] = _difference(bare, other, width)
    return found


def _difference(bare: _Recorded, other: _Recorded, width: int) -> dict[str, object]:
    ours, theirs = bare.sequences[:, width:], other.sequences[:, width:]
    n = min(ours.shape[1], theirs.shape[1])
    differs = ours[:, :n] != theirs[:, :n]
    apart = differs.cumsum(1)
    largest, ties = 0.0, torch.zeros(len(ours), dtype=torch.bool, device=ours.device)
    for step in range(n):
        # Scores up to and with the choice in which a row parts were made from the same ids.
        same = apart[:, step - 1] == 0 if step else torch.ones_like(ties)
        scores = bare.logits[step].float()
        gap = (scores - other.logits[step].float())[same]
        largest = max(largest, float(gap.abs().max()) if len(gap) else 0.0)
        top = scores.topk(2, dim=-1).values
        looks = differs[:, step] if bool(differs.any()) else torch.ones_like(ties)
        ties |= (top[:, 0] == top[:, 1]) & looks & same
    return {
        "same_ids": not bool(differs.any()),
        "rows_that_part": int(differs.any(1).sum()),
        "largest_difference": round(largest, 6),
        "rows_that_tie": int(ties.sum()),
    }
