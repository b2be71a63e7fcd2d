"""Fit the probes that are compared: `python -m benchmarks.real_text.fitted`.

All are fitted on the window means of the rows of the part *fit*. Which channels tell is found
on the same rows. For two of the sets a probe is fitted without each source, to judge it.

Writes one file of weights, a head a probe. Knows sets of channels. Does not know statistics.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.real_text.candidates import (
    TWO_CLASS,
    Channels,
    Examples,
    channels_of,
    examples_of,
    fit,
    sites_at,
    telling,
)
from benchmarks.real_text.harvest import fitted_rows, load_shallow
from benchmarks.real_text.parts import study_rows
from benchmarks.real_text.windows import every_site, read_shards
from benchmarks.real_text.workplace import parser_of
from probes.location.locate import LocateConfig, locate
from probes.location.units import UnitSet, sites_of
from safe_decode.activations.site import Site
from safe_decode.loading import Loaded

__all__ = ["main"]

LOG = logging.getLogger("benchmarks.real_text")
_RESIDUAL = (8, 12, 16, 19)
_C = 1e-2
_REFUSALS, _CALM = 30, 60
"""Distinct refusals that are wanted, and ordinary answers that are read, to locate units."""


def located(loaded: Loaded, data: Path, work: Path) -> UnitSet:
    """Locate units of importance on the model's own refusals of the part *fit*; kept in `work`."""
    kept = work / "units.safetensors"
    if kept.exists():
        return UnitSet.load(kept)
    rows = [row for row in study_rows(data) if row.part == "fit"]
    refusals = [r.conversation for r in rows if r.source == "own harmful-plain" and r.refusal]
    calm = [r.conversation for r in rows if r.source == "own benign-long"][:_CALM]
    least = min(len({row.response for row in refusals}), _REFUSALS)
    config = LocateConfig(min_refusals=least)
    units = locate(loaded.model, loaded.tokenizer, refusals, calm, config)
    units.save(kept)
    return units


def sets_of(
    examples: Examples, sites: Sequence[Site], at: NDArray[np.bool_], units: UnitSet
) -> dict[str, Channels]:
    """Name the sets of channels that are compared."""
    one = channels_of(sites, {"resid": [16]})
    four = channels_of(sites, {"resid": _RESIDUAL})
    told = {}
    for kind in ("attn", "mlp"):
        every = channels_of(sites, {kind: None})
        told[kind] = (every, telling(examples, at, every))
    count = len(four)

    def most(kinds: Sequence[str], n: int) -> Channels:
        places = np.concatenate([told[kind][0] for kind in kinds])
        apart = np.concatenate([told[kind][1] for kind in kinds])
        return np.sort(places[np.argsort(-apart, kind="stable")[:n]])

    found = {
        "residual, 1 layer": one,
        "residual, 4 layers": four,
        "neurons that tell": most(["mlp"], count),
        "heads that tell": most(["attn"], count),
        "heads and neurons that tell": most(["attn", "mlp"], count),
        "heads and neurons that tell, as few": most(["attn", "mlp"], len(one)),
        "all of these": np.unique(
            np.concatenate([four, most(["mlp"], count), most(["attn"], count)])
        ),
    }
    found["units of importance"] = _places(sites, sites_of(units.most_critical(count)))
    return found


def _places(sites: Sequence[Site], wanted: Sequence[Site]) -> Channels:
    start: dict[tuple[int, str], int] = {}
    place = 0
    for site in sites:
        start[site.layer, site.kind] = place
        place += len(site.channels)
    found = [start[s.layer, s.kind] + channel for s in wanted for channel in s.channels]
    return np.sort(np.asarray(found, np.int64))


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, and write `probes.npz` beside the windows."""
    arguments = parser_of(__doc__, has_model=True).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = fitted_rows(arguments.data)
    loaded = load_shallow(arguments.model)
    sites = every_site(loaded)
    units = located(loaded, arguments.data, arguments.work)
    examples = examples_of(read_shards(arguments.work / "windows"), rows)
    part = np.asarray([rows[i].part for i in examples.row])
    at = part == "fit"
    sets = sets_of(examples, sites, at, units)
    union = np.unique(np.concatenate(list(sets.values())))
    heads: list[tuple[str, NDArray[np.float64], float]] = []

    def add(
        name: str, channels: Channels, values: NDArray[np.float32], used: NDArray[np.bool_]
    ) -> None:
        solved = fit(examples, values, used, c=_C, has_offsets=False)
        weight = np.zeros(len(union))
        weight[np.searchsorted(union, channels)] = solved.weight
        heads.append((name, weight, solved.bias))
        LOG.info("fitted %s on %d windows", name, int(used.sum()))

    for name, channels in sets.items():
        values = examples.values(channels)
        add(name, channels, values, at)
        if name in ("residual, 4 layers", "heads and neurons that tell"):
            for source in TWO_CLASS:
                add(f"{name} without {source}", channels, values, at & (examples.source != source))
    read = [asdict(site) for site in sites_at(sites, union)]
    np.savez(
        arguments.work / "probes.npz",
        sites=json.dumps(read),
        names=np.asarray([name for name, _, _ in heads]),
        weight=np.stack([weight for _, weight, _ in heads], axis=1),
        bias=np.asarray([bias for _, _, bias in heads]),
        features=json.dumps({name: len(channels) for name, channels in sets.items()}),
    )


if __name__ == "__main__":
    main()
