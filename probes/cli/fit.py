"""`safe-decode fit`: from labelled conversations and a model to a certified bundle.

Knows the options and how the outcome is shown. The path itself is `probes.recipes.bundle`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli.envelopes import (
    EnvelopeOptions,
    certificate_facts,
    envelope_of,
    foreign_note,
    require_delta,
)
from probes.cli.options import DataOptions, SplitOptions, whole
from probes.cli.sites import FEATURE_COUNTS, SiteOptions, residual_sites
from probes.cli.tables.facts import show_facts, show_warnings
from probes.fitting.registry import FITTERS
from probes.recipes.early_checks import (
    judged_rows,
    require_both_kinds,
    require_bundle_place,
    require_draws,
    require_splits,
)
from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json, require_folder, require_place
from safe_decode.cli.options import JsonOptions, ModelOptions
from safe_decode.cli.tables import WordTable, print_table

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.data.reader import Reading
    from probes.data.splits import Prepared
    from probes.fitting.search import FeatureStore
    from probes.recipes.bundle import Recipe, RecipeConfig
    from safe_decode.loading import Loaded

__all__ = ["fit"]

_SHOWN = 10
_ALPHAS = (0.01,)
_REFUSAL = "I can't help with that."
_OPENER = "Sorry, I"


@dataclass(frozen=True, kw_only=True)
class FitOptions(
    SiteOptions, EnvelopeOptions, DataOptions, SplitOptions, ModelOptions, JsonOptions
):
    """Options of `safe-decode fit`."""

    out: Annotated[Path, typer.Option(help="Directory that the bundle is written to.")]
    probe: Annotated[
        str, typer.Option(help=f"Kind of probe to fit: {' or '.join(sorted(FITTERS))}.")
    ] = "linear"
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Way of fitting a linear probe: pooled, token, windowed or mass_mean. May be "
            "given several times. Without it: all four."
        ),
    ] = None
    statistic: Annotated[
        list[str] | None,
        typer.Option(
            help="Statistic to try: ema, mean, cusum or hysteresis. May be given several times. "
            "Without it: all four."
        ),
    ] = None
    c: Annotated[
        list[float] | None,
        typer.Option(
            "--c",
            help="Inverse strength C of the L2 penalty of a linear probe. Given several times, "
            "the values are compared on the fit split. Without it: 0.1.",
        ),
    ] = None
    by_category: Annotated[
        bool, typer.Option(help="Also try a probe with one head for each category of harm.")
    ] = False
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            help="False-alarm rate to certify; the first becomes the default. May be given "
            "several times. Without it: 0.01."
        ),
    ] = None
    refusal: Annotated[
        str, typer.Option(help="Text that replaces an answer when the guard refuses.")
    ] = _REFUSAL
    opener: Annotated[str, typer.Option(help="First words of the new answer after a rewind.")] = (
        _OPENER
    )
    store: Annotated[
        Path | None,
        typer.Option(
            help="Directory that keeps the activations, as `safe-decode harvest` writes them; "
            "those that are there are used. Without it: they are kept in memory."
        ),
    ] = None
    recompute: Annotated[
        bool,
        typer.Option(help="Keep no activations, and run the model again for each pass instead."),
    ] = False


@command("Make a probe")
def fit(options: FitOptions) -> None:
    """Locate, fit, select and calibrate: one command from conversations to a bundle."""
    _require_sense(options)
    from probes.data.splits import prepared
    from probes.fitting.search import FeatureStore

    keep = FeatureStore(options.store, options.recompute)
    readings = options.read()
    _require_enough(readings, options)
    own = options.load_model()
    rows, too_long = whole(own, [row for one in readings for row in one.conversations])
    judged = [row for row in rows if row.response_harmful is not None]
    ready = prepared(judged, seed=options.seed, balance=options.balance)
    provenance = {
        "sources": [one.to_json() for one in readings],
        "data": ready.report,
        "too_long_for_the_context": too_long,
        "without_judgement": len(rows) - len(judged),
        "seed": options.seed,
    }
    recipe = _recipe(own, ready, options, keep, provenance)
    recipe.bundle.save(options.out)
    if options.as_json:
        print_json(_as_json(recipe, options.out, provenance))
        return
    show_warnings(readings, [*ready.warnings, *_notes(recipe)])
    _show(recipe, options.out)


def _require_sense(options: FitOptions) -> None:
    """Refuse, before anything is read, options that no data could satisfy."""
    from probes.fitting.search import fits_of, statistics_of

    require_place(options.out.parent / "file")
    require_bundle_place(options.out)
    if options.store is not None:
        require_folder(options.store)
    require_delta(options.delta)
    fits_of(options.method, None, options.probe)
    statistics_of(options.statistic)
    options.require_layers(options.model)


def _require_enough(readings: Sequence[Reading], options: FitOptions) -> None:
    """Refuse, before the model is loaded, data that no bundle could come of."""
    judged = judged_rows(readings)
    locates = options.units is None and options.residual is None
    require_splits(judged, (*(("locate",) if locates else ()), "fit", "select", "calibrate"))
    require_both_kinds(judged, ("fit", "select"))
    require_draws(judged, options.alpha or _ALPHAS, options.delta)


def _recipe(
    own: Loaded,
    ready: Prepared,
    options: FitOptions,
    keep: FeatureStore,
    provenance: Mapping[str, Any],
) -> Recipe:
    from probes.location.units import UnitSet
    from probes.recipes.bundle import make_bundle

    return make_bundle(
        own.model,
        own.tokenizer,
        ready.conversations,
        _config(own, ready.conversations, options),
        provenance=provenance,
        units=None if options.units is None else UnitSet.load(options.units),
        features=keep,
    )


def _config(own: Loaded, rows: Sequence[Conversation], options: FitOptions) -> RecipeConfig:
    from probes.fitting.search import fits_of, statistics_of
    from probes.recipes.bundle import RecipeConfig

    # Which responses certify is decided by split and label, as the recipe takes them.
    calibrating = [row for row in rows if row.split == "calibrate" and not row.response_harmful]
    envelope = envelope_of(own, calibrating or rows, options)
    residual, c = options.residual, options.c or []
    reads_units = options.units is not None or residual is None
    alphas = tuple(options.alpha or _ALPHAS)
    return RecipeConfig(
        envelope=envelope,
        refusal=options.refusal,
        opener=options.opener,
        feature_counts=tuple(options.features or FEATURE_COUNTS) if reads_units else (),
        extra_sites=(
            {}
            if residual is None
            else {f"residual-{residual}": residual_sites(own.model, residual)}
        ),
        fits=fits_of(options.method, c[0] if c else None, options.probe),
        windows=(),
        statistics=statistics_of(options.statistic),
        c_grid=tuple(c) if len(c) > 1 else (),
        by_category=options.by_category,
        alphas=alphas,
        default_alpha=alphas[0],
        delta=options.delta,
        lower_caps=options.max_new_tokens is None,
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
        "certificates": [certificate_facts(one) for one in bundle.certificates],
        "certificates_refused": recipe.calibration.refused,
        "not_of_this_model": sum(recipe.calibration.foreign.values()),
        **provenance,
    }


def _show(recipe: Recipe, out: Path) -> None:
    columns = ("sites", "fit", "statistic", "TPR", "AUROC", "delay p90", "hold-back")
    rows = []
    for one in recipe.tried[:_SHOWN]:
        hits = f" x{one['hits']}" if one["hits"] > 1 else ""
        size = {"mean": one["window"], "cusum": round(one["drift"], 2)}.get(
            one["statistic"], round(one["smoothing"], 2)
        )
        rows.append(
            [
                one["sites"],
                one["way"],
                f"{one['statistic']} {size}{hits}",
                f"{one['tpr']:.1%}",
                f"{one['auroc']:.4f}",
                str(one["delay_p90"]),
                str(one["holdback_tokens"]),
            ]
        )
    print_table(WordTable(columns, rows, "Best on select"))
    console().print(f"{len(recipe.tried)} candidates; the first is in the bundle.")
    certified = {
        f"{one.population} at {one.alpha:g}": (
            f"threshold {one.threshold:.4g} (n={one.n}, j={one.j}), {one.evidence.source}, up to "
            f"{one.envelope.max_new_tokens} tokens"
        )
        for one in recipe.bundle.certificates
    }
    show_facts("Certificates", certified, out)
