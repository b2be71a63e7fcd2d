"""`safe-decode harvest`: activations of responses, to memory-mapped shards that can go on.

Knows the options and which splits and sites are read. Does not know how shards are written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from probes.cli.options import DataOptions, SplitOptions, whole
from probes.cli.shared_options.sites import SiteOptions, site_sets_of
from probes.cli.tables.facts import show_facts, show_warnings
from probes.recipes.early_checks import judged_rows, require_splits
from safe_decode.cli.command import command
from safe_decode.cli.console import print_json, require_folder
from safe_decode.cli.options import JsonOptions, ModelOptions
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from probes.data.conversations import Conversation
    from safe_decode.activations.site import Site
    from safe_decode.loading import Loaded

__all__ = ["harvest"]


@dataclass(frozen=True, kw_only=True)
class HarvestOptions(SiteOptions, DataOptions, SplitOptions, ModelOptions, JsonOptions):
    """Options of `safe-decode harvest`."""

    out: Annotated[
        Path, typer.Option(help="Directory that the shards are written to, one folder a split.")
    ]
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="Split whose responses are read. May be given several times. Without it: fit and "
            "select."
        ),
    ] = None
    storage: Annotated[
        Literal["float16", "float32"],
        typer.Option(help="Number format in which activations are stored."),
    ] = "float16"
    tokens_per_batch: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of one batch, padding included; this bounds the memory used."
        ),
    ] = 4096


@command("Make a probe")
def harvest(options: HarvestOptions) -> None:
    """Harvest activations; called again, it goes on where it stopped."""
    from probes.activations.features import union_of_sites
    from probes.data.conversations import by_split
    from probes.data.splits import prepared
    from probes.recipes.reading import telling_sites

    wanted = _splits(options.split or ["fit", "select"])
    require_folder(options.out)
    options.require_some()
    options.require_layers(options.model)
    readings = options.read()
    require_splits(judged_rows(readings), wanted)
    own = options.load_model()
    rows, too_long = whole(own, [row for one in readings for row in one.conversations])
    judged = [row for row in rows if row.response_harmful is not None]
    ready = prepared(judged, seed=options.seed, balance=options.balance)
    split = by_split(ready.conversations)
    named = site_sets_of(own.model, options.units, options.features, options.residual)
    if options.telling:
        named |= telling_sites(own.model, own.tokenizer, split["fit"], options.telling)
    sites = union_of_sites(named.values())
    require_splits(ready.conversations, wanted)
    facts = {
        **_harvested(own, {name: split[name] for name in wanted}, sites, options),
        "too_long_for_the_context": too_long,
    }
    if options.as_json:
        report = {"out": str(options.out), "splits": ready.report, **facts}
        print_json({**report, "sources": [one.to_json() for one in readings]})
        return
    show_warnings(readings, ready.warnings)
    show_facts("Activations", facts, options.out)


def _harvested(
    own: Loaded,
    parts: Mapping[str, Sequence[Conversation]],
    sites: Sequence[Site],
    options: HarvestOptions,
) -> dict[str, object]:
    """Write the shards of each split, and say what was read and how long it took."""
    from probes.activations.harvest import harvest_to

    begun = time.perf_counter()
    positions, n_bytes = {}, 0
    for name, rows in parts.items():
        found = harvest_to(
            options.out / name,
            own.model,
            own.tokenizer,
            rows,
            sites,
            storage=options.storage,
            tokens_per_batch=options.tokens_per_batch,
        )
        positions[name] = sum(len(values) for values in found.responses)
        n_bytes += sum(values.nbytes for values in found.responses)
    return {
        "responses": {name: len(rows) for name, rows in parts.items()},
        "positions": positions,
        "features": sum(len(site.channels) for site in sites),
        "bytes": n_bytes,
        "seconds": round(time.perf_counter() - begun, 2),
    }


def _splits(names: Sequence[str]) -> list[Any]:
    from probes.data.conversations import SPLITS

    unknown = [name for name in names if name not in SPLITS]
    if unknown:
        raise ConfigurationError(f"--split={unknown[0]!r} is not one of {SPLITS}; pass one.")
    return list(names)
