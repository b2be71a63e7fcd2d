"""`safe-decode fit`: from labelled conversations and a model to a certified bundle.

Knows the options and how the outcome is shown. The path itself is `probes.recipes.bundle`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli.options import DataOptions, SplitOptions, whole
from probes.cli.shared_options.envelopes import (
    EnvelopeOptions,
    certificate_facts,
    envelope_of,
    foreign_note,
    require_delta,
)
from probes.cli.shared_options.sites import FEATURE_COUNTS, SiteOptions, residual_sites
from probes.cli.tables.facts import show_warnings
from probes.cli.tables.fitted import show_fitted
from probes.fitting.registry import FITTERS
from probes.recipes.early_checks import (
    judged_rows,
    require_both_kinds,
    require_bundle_place,
    require_draws,
    require_splits,
)
from safe_decode.cli.command import command
from safe_decode.cli.console import print_json, require_folder, require_place
from safe_decode.cli.options import JsonOptions, ModelOptions

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.data.reader import Reading
    from probes.data.splits import Prepared
    from probes.fitting.search import FeatureStore
    from probes.recipes.bundle import Recipe, RecipeConfig
    from safe_decode.loading import Loaded

__all__ = ["fit"]

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
            help="Statistic to try: ema, mean, cusum, shrunk, bank, top, even or hysteresis. May "
            "be given several times. Without it: all of them."
        ),
    ] = None
    c: Annotated[
        list[float] | None,
        typer.Option(
            "--c",
            help="Inverse strength C of the L2 penalty of a linear probe. Given several times, "
            "the values are compared on the fit split. Without it: 0.1 for up to 256 features, and "
            "less the more there are.",
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

    @property
    def names_what_is_tried(self) -> bool:
        """Whether an option names sites, fits or statistics, or how features are kept."""
        named = (self.method, self.statistic, self.residual, self.units, self.recompute)
        return any(named) or self.probe != "linear"


@command("Make a probe")
def fit(options: FitOptions) -> None:
    """Locate, fit, select and calibrate: one command from conversations to a bundle."""
    _require_places(options)
    # Checking what is tried imports for seconds: by default, data is looked at first.
    keep = _require_sense(options) if options.names_what_is_tried else None
    from probes.data.enough import require_labels
    from probes.data.splits import prepared

    readings = options.read()
    _require_enough(readings, options)
    rows = [row for one in readings for row in one.conversations]
    judged = [row for row in rows if row.response_harmful is not None]
    ready = prepared(judged, seed=options.seed, balance=options.balance)
    short = require_labels(ready.conversations)
    keep = keep or _require_sense(options)
    own = options.load_model()
    kept, too_long = whole(own, ready.conversations)
    ready = replace(ready, conversations=kept, warnings=[*ready.warnings, *short])
    provenance = {
        "sources": [one.to_json() for one in readings],
        "data": ready.report,
        "too_long_for_the_context": too_long,
        "without_judgement": len(rows) - len(judged),
        "seed": options.seed,
    }
    recipe = _worth(own, _recipe(own, ready, options, keep, provenance), ready)
    recipe.bundle.save(options.out)
    if options.as_json:
        print_json(_as_json(recipe, options.out, provenance))
        return
    show_warnings(readings, [*ready.warnings, *_notes(recipe, options)])
    show_fitted(recipe, options.out)


def _worth(own: Loaded, recipe: Recipe, ready: Prepared) -> Recipe:
    """Count recall and false alarms on the test split, which nothing was chosen by."""
    from probes.evaluation.worth import measured_peaks, worth_of
    from probes.recipes.reading import is_located
    from safe_decode import __version__

    test = [row for row in ready.conversations if row.split == "test"]
    peaks = measured_peaks(own.model, own.tokenizer, recipe.bundle, test)
    worth = worth_of(
        test,
        peaks,
        recipe.bundle.certificate(),
        is_located=is_located(str(recipe.tried[0]["sites"])),
        warnings=ready.warnings,
    )
    provenance = {**recipe.bundle.provenance, "worth": worth, "made_by": __version__}
    made = datetime.now(UTC).date().isoformat()
    return replace(recipe, bundle=replace(recipe.bundle, provenance=provenance, made=made))


def _require_places(options: FitOptions) -> None:
    """Refuse, before anything is read, places that cannot be written and impossible bounds."""
    require_place(options.out.parent / "file")
    require_bundle_place(options.out)
    if options.store is not None:
        require_folder(options.store)
    require_delta(options.delta)


def _require_sense(options: FitOptions) -> FeatureStore:
    """Refuse, before the model is loaded, options that no data could satisfy."""
    from probes.fitting.search import FeatureStore, fits_of
    from probes.fitting.statistics import statistics_of

    fits_of(options.method, None, options.probe)
    statistics_of(options.statistic)
    options.require_layers(options.model)
    return FeatureStore(options.store, options.recompute)


def _require_enough(readings: Sequence[Reading], options: FitOptions) -> None:
    """Refuse, before the model is loaded, data that no bundle could come of."""
    judged = judged_rows(readings)
    require_splits(judged, ("fit", "select", "calibrate"))
    require_both_kinds(judged, ("fit", "select"))
    n_caps = 1 + len(options.cap or ())
    require_draws(judged, options.alpha or _ALPHAS, options.delta, n_caps=n_caps)


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
    from probes.fitting.search import fits_of
    from probes.fitting.statistics import statistics_of
    from probes.recipes.bundle import RecipeConfig
    from probes.recipes.reading import has_refusals, telling_counts

    # Which responses certify is decided by split and label, as the recipe takes them.
    calibrating = [row for row in rows if row.split == "calibrate" and not row.response_harmful]
    envelope = envelope_of(own, calibrating or rows, options)
    residual, c = options.residual, options.c or []
    finds = options.names_no_sites
    locates = options.units is not None or (finds and has_refusals(rows))
    telling = tuple(options.telling or (telling_counts(own.model) if finds else ()))
    alphas = tuple(options.alpha or _ALPHAS)
    return RecipeConfig(
        envelope=envelope,
        refusal=options.refusal,
        opener=options.opener,
        feature_counts=tuple(options.features or FEATURE_COUNTS) if locates else (),
        telling_counts=telling,
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
        caps=tuple(options.cap or ()),
        lower_caps=options.max_new_tokens is None,
    )


def _notes(recipe: Recipe, options: FitOptions) -> list[str]:
    notes = [
        f"no certificate for {name}: {why}" for name, why in recipe.calibration.refused.items()
    ]
    if options.names_no_sites and recipe.units is None:
        notes.append(
            "units of importance were not located: the split locate holds too few refusals"
        )
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
        "worth": bundle.provenance["worth"],
        **provenance,
    }
