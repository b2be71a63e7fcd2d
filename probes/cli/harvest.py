"""`safe-decode harvest`: activations of responses, to memory-mapped shards that can go on.

Knows the options and which splits and sites are read. Does not know how shards are written.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from probes.cli.options import (
    Balance,
    Columns,
    Data,
    Seed,
    Strict,
    loaded,
    read,
    show_facts,
    show_warnings,
    whole,
)
from safe_decode.cli.console import print_json
from safe_decode.cli.generate import Device, DtypeName, ModelName
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safe_decode.activations.site import Site

__all__ = ["Features", "Residual", "UnitsFile", "harvest", "residual_sites", "site_sets_of"]

UnitsFile = Annotated[Path | None, typer.Option("--units", help="Units from `safe-decode locate`.")]
Features = Annotated[
    list[int] | None,
    typer.Option("--features", help="Features at the most critical units; several to try."),
]
Residual = Annotated[
    str | None,
    typer.Option(
        "--residual", help="Whole residual layers to read: all, or numbers such as 2,4,5."
    ),
]


def harvest(
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory of the shards, one folder a split.")],
    model: ModelName = None,
    columns: Columns = "auto",
    units: UnitsFile = None,
    features: Features = None,
    residual: Residual = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Splits to read; default fit and select.")
    ] = None,
    storage: Annotated[
        Literal["float16", "float32"], typer.Option(help="How activations are stored.")
    ] = "float16",
    tokens_per_batch: Annotated[
        int, typer.Option(min=1, help="Padded tokens run at once; bounds the memory.")
    ] = 4096,
    balance: Balance = False,
    seed: Seed = 0,
    strict: Strict = False,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Harvest activations; called again, it goes on where it stopped."""
    from probes.activations.features import union_of_sites
    from probes.activations.harvest import harvest_to
    from probes.data.conversations import by_split
    from probes.data.splits import prepared

    wanted = _splits(split or ["fit", "select"])
    readings = read(data, columns, strict=strict)
    own = loaded(model, device, dtype)
    sites = union_of_sites(site_sets_of(own.model, units, features, residual).values())
    rows, too_long = whole(own, [row for one in readings for row in one.conversations])
    ready = prepared(
        [row for row in rows if row.response_harmful is not None], seed=seed, balance=balance
    )
    parts = by_split(ready.conversations)
    begun = time.perf_counter()
    positions, n_bytes = {}, 0
    for name in wanted:
        found = harvest_to(
            out / name,
            own.model,
            own.tokenizer,
            parts[name],
            sites,
            storage=storage,
            tokens_per_batch=tokens_per_batch,
        )
        positions[name] = sum(len(values) for values in found.responses)
        n_bytes += sum(values.nbytes for values in found.responses)
    facts = {
        "responses": {name: len(parts[name]) for name in wanted},
        "positions": positions,
        "features": sum(len(site.channels) for site in sites),
        "bytes": n_bytes,
        "seconds": round(time.perf_counter() - begun, 2),
        "too_long_for_the_context": too_long,
    }
    if as_json:
        report = {"out": str(out), "splits": ready.report, **facts}
        print_json({**report, "sources": [one.to_json() for one in readings]})
        return
    show_warnings(readings, ready.warnings)
    show_facts("Activations", facts, out)


def site_sets_of(
    model: Any,  # noqa: ANN401 - a transformers causal language model
    units: Path | None,
    features: Sequence[int] | None,
    residual: str | None,
) -> dict[str, tuple[Site, ...]]:
    """Name the sets of sites that the options ask for.

    Raises:
        ConfigurationError: They ask for none, or for a layer that is not there.
    """
    found: dict[str, tuple[Site, ...]] = {}
    if units is not None:
        from probes.location.units import UnitSet, sites_of

        located = UnitSet.load(units)
        for count in features or (64, 256):
            found[f"units-{count}"] = sites_of(located.most_critical(count))
    if residual is not None:
        found[f"residual-{residual}"] = residual_sites(model, residual)
    if not found:
        raise ConfigurationError("nothing to read; pass --units from `locate`, or --residual all.")
    return found


def residual_sites(model: Any, spec: str) -> tuple[Site, ...]:  # noqa: ANN401
    """Read whole residual layers: `all`, or numbers with commas."""
    from safe_decode.activations.architecture import anatomy_of
    from safe_decode.activations.site import Site, sorted_sites

    anatomy = anatomy_of(model)
    n_layers = len(anatomy.blocks)
    try:
        layers = range(n_layers) if spec == "all" else [int(part) for part in spec.split(",")]
    except ValueError as error:
        raise ConfigurationError(
            f"--residual={spec!r} is neither all nor layers such as 2,4,5."
        ) from error
    if any(not 0 <= layer < n_layers for layer in layers):
        raise ConfigurationError(
            f"--residual={spec!r} names a layer outside this model's 0..{n_layers - 1}."
        )
    width = tuple(range(anatomy.d_model))
    return sorted_sites(Site(layer, "resid", width) for layer in set(layers))


def _splits(names: Sequence[str]) -> list[Any]:
    from probes.data.conversations import SPLITS

    unknown = [name for name in names if name not in SPLITS]
    if unknown:
        raise ConfigurationError(f"--split={unknown[0]!r} is not one of {SPLITS}; pass one.")
    return list(names)
