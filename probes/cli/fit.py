"""`safe-decode fit`: from labelled conversations and a model to a certified bundle.

Knows the options and how the outcome is shown. The path itself is `probes.recipes.bundle`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli.envelopes import EnvelopeOptions, envelope_of, foreign_note, require_delta
from probes.cli.harvest import Features, Residual, UnitsFile, residual_sites
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
from safe_decode.cli.console import console, print_json, require_place
from safe_decode.cli.generate import Device, DtypeName, ModelName
from safe_decode.errors import DataError

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.fitting.linear import FitConfig
    from probes.fitting.selection import StatisticChoice
    from probes.recipes.bundle import Recipe, RecipeConfig
    from safe_decode.loading import Loaded

__all__ = ["fit"]

_SHOWN = 10
_REFUSAL = "I can't help with that."
_OPENER = "Sorry, I"


def fit(
    data: Data,
    out: Annotated[Path, typer.Option(help="Write the bundle to this directory.")],
    model: ModelName = None,
    columns: Columns = "auto",
    units: UnitsFile = None,
    features: Features = None,
    residual: Residual = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Way of fitting: pooled, token, windowed or mass_mean; default all."),
    ] = None,
    statistic: Annotated[
        list[str] | None,
        typer.Option(help="Statistic: ema, mean, cusum or hysteresis; default all."),
    ] = None,
    c: Annotated[
        list[float] | None,
        typer.Option("--c", help="Candidates for C; one is taken as it is, several compared."),
    ] = None,
    by_category: Annotated[
        bool, typer.Option(help="Try a head for each category of harm too.")
    ] = False,
    alpha: Annotated[
        list[float] | None, typer.Option(help="Levels to certify; the first is the default's.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Chance that the bounds do not hold.")] = 0.05,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Cap to certify; default the largest that they support."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="At which the responses were sampled; default as they record, else 0, greedy.",
        ),
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Likewise; 0 for none.")] = None,
    refusal: Annotated[str, typer.Option(help="The canned refusal.")] = _REFUSAL,
    opener: Annotated[str, typer.Option(help="First words after a rewind.")] = _OPENER,
    store: Annotated[
        Path | None, typer.Option(help="Keep activations here, as `harvest` does; reused.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option(help="Keep no activations: run the model again each pass.")
    ] = False,
    balance: Balance = False,
    seed: Seed = 0,
    strict: Strict = False,
    device: Device = "cpu",
    dtype: DtypeName = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Locate, fit, select and calibrate: one command from conversations to a bundle."""
    require_place(out.parent / "file")
    require_delta(delta)
    from probes.data.splits import prepared
    from probes.fitting.search import FeatureStore, fits_of, statistics_of
    from probes.location.units import UnitSet
    from probes.recipes.bundle import make_bundle

    keep = FeatureStore(store, recompute)
    readings = read(data, columns, strict=strict)
    own = loaded(model, device, dtype)
    rows, too_long = whole(own, [row for one in readings for row in one.conversations])
    judged = [row for row in rows if row.response_harmful is not None]
    if not judged:
        raise DataError("no conversation has response_harmful 0 or 1; judge them first.")
    ready = prepared(judged, seed=seed, balance=balance)
    counts = tuple(features or (64, 256))
    config = _config(
        own,
        ready.conversations,
        feature_counts=counts if units is not None or residual is None else (),
        residual=residual,
        fits=fits_of(method, c[0] if c else 0.1),
        statistics=statistics_of(statistic),
        c_grid=tuple(c or ()) if c and len(c) > 1 else (),
        by_category=by_category,
        alphas=tuple(alpha or (0.01,)),
        delta=delta,
        asked=EnvelopeOptions(max_new_tokens, temperature, top_p, top_k),
        texts=(refusal, opener),
    )
    provenance = {
        "sources": [one.to_json() for one in readings],
        "data": ready.report,
        "too_long_for_the_context": too_long,
        "without_judgement": len(rows) - len(judged),
        "seed": seed,
    }
    recipe = make_bundle(
        own.model,
        own.tokenizer,
        ready.conversations,
        config,
        provenance=provenance,
        units=None if units is None else UnitSet.load(units),
        features=keep,
    )
    recipe.bundle.save(out)
    if as_json:
        print_json(_as_json(recipe, out, provenance))
        return
    show_warnings(readings, [*ready.warnings, *_notes(recipe)])
    _show(recipe, out)


def _config(
    own: Loaded,
    rows: Sequence[Conversation],
    *,
    feature_counts: tuple[int, ...],
    residual: str | None,
    fits: tuple[FitConfig, ...],
    statistics: tuple[StatisticChoice, ...],
    c_grid: tuple[float, ...],
    by_category: bool,
    alphas: tuple[float, ...],
    delta: float,
    asked: EnvelopeOptions,
    texts: tuple[str, str],
) -> RecipeConfig:
    from probes.recipes.bundle import RecipeConfig

    # Which responses certify is decided by split and label, as the recipe takes them.
    calibrating = [row for row in rows if row.split == "calibrate" and not row.response_harmful]
    envelope = envelope_of(own, calibrating or rows, asked)
    extra = (
        {} if residual is None else {f"residual-{residual}": residual_sites(own.model, residual)}
    )
    return RecipeConfig(
        envelope=envelope,
        refusal=texts[0],
        opener=texts[1],
        feature_counts=feature_counts,
        extra_sites=extra,
        fits=fits,
        windows=(),
        statistics=statistics,
        c_grid=c_grid,
        by_category=by_category,
        alphas=alphas,
        default_alpha=alphas[0],
        delta=delta,
        lower_caps=asked.max_new_tokens is None,
    )


def _notes(recipe: Recipe) -> list[str]:
    notes = [
        f"no certificate for {name}: {why}" for name, why in recipe.calibration.refused.items()
    ]
    if note := foreign_note(recipe.calibration.foreign, recipe.bundle.provenance["calibrated"]):
        notes.append(note)
    return notes


def _as_json(recipe: Recipe, out: Path, provenance: Mapping[str, Any]) -> dict[str, object]:
    bundle = recipe.bundle
    return {
        "out": str(out),
        "bundle": bundle.digest,
        "chosen": recipe.tried[0],
        "tried": list(recipe.tried),
        "holdback_tokens": bundle.holdback_tokens,
        "certificates": [
            {
                **{
                    name: getattr(one, name)
                    for name in ("population", "alpha", "delta", "n", "j", "threshold")
                },
                "source": one.evidence.source,
                "max_new_tokens": one.envelope.max_new_tokens,
            }
            for one in bundle.certificates
        ],
        "certificates_refused": recipe.calibration.refused,
        "not_of_this_model": sum(recipe.calibration.foreign.values()),
        **provenance,
    }


def _show(recipe: Recipe, out: Path) -> None:
    from rich.table import Table

    columns = ("sites", "fit", "statistic", "TPR", "AUROC", "delay p90", "hold-back")
    table = Table(*columns, title="Best on select", title_justify="left")
    for one in recipe.tried[:_SHOWN]:
        way = one["fit"]
        name = f"{way['method']} C={way['c']:g}"
        name += f" M={way['window']}" if way["method"] == "windowed" else ""
        hits = f" x{one['hits']}" if one["hits"] > 1 else ""
        size = {"mean": one["window"], "cusum": round(one["drift"], 2)}.get(
            one["statistic"], round(one["smoothing"], 2)
        )
        table.add_row(
            one["sites"],
            name,
            f"{one['statistic']} {size}{hits}",
            f"{one['tpr']:.1%}",
            f"{one['auroc']:.4f}",
            str(one["delay_p90"]),
            str(one["holdback_tokens"]),
        )
    console().print(table)
    console().print(f"{len(recipe.tried)} candidates; the first is in the bundle.")
    certified = {
        f"{one.population} at {one.alpha:g}": (
            f"threshold {one.threshold:.4g} (n={one.n}, j={one.j}), {one.evidence.source}, up to "
            f"{one.envelope.max_new_tokens} tokens"
        )
        for one in recipe.bundle.certificates
    }
    show_facts("Certificates", certified, out)
