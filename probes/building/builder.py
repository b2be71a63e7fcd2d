"""The whole path from a recipe and a model to a bundle that says what it is worth.

prompts -> the model's own answers -> labels -> locate -> fit -> select -> certify -> evaluate.
What is finished is kept in a work directory, and a build that was ended goes on there: the same
recipe, data and model give the same bundle, however often it was ended.

Knows the order of the steps and what is recorded. Each step is a module of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from probes.building.answers import judged_rows, rollout_config
from probes.building.counts import (
    LEAST_REFUSALS,
    SplitCounts,
    counts_of,
    require_enough,
    warnings_of,
)
from probes.building.material import Material
from probes.building.recipe import BuildRecipe
from probes.building.tries import fits_for, site_candidates, telling_counts
from probes.building.workplace import Workplace
from probes.calibration.statistic import maxima
from probes.data.conversations import Conversation
from probes.evaluation.offline import EvaluationConfig, Report, evaluate_bundle
from probes.evaluation.worth import worth_of
from probes.fitting.search import FeatureStore
from probes.fitting.statistics import statistics_of
from probes.location.locate import LocateConfig, locate
from probes.location.units import UnitSet
from probes.recipes.bundle import Recipe, RecipeConfig, make_bundle
from probes.recipes.reading import is_located
from probes.rollouts.judges import RowJudge
from probes.runs.identity import weights_digest
from safe_decode import __version__
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.summary import summary_of
from safe_decode.certificate import Envelope
from safe_decode.engines.transformers.coverage import record_of
from safe_decode.errors import UnsupportedError
from safe_decode.loading import Loaded
from safe_decode.prompts.chat import stop_ids

__all__ = ["Built", "Stage", "build_bundle", "work_identity"]

Result = TypeVar("Result")

_LOCATED_WITHIN = 0.005
"""Located units are read where the residual stream gains at most so much recall on select."""

Stage = Callable[[str], None]
"""Told the name of each step as it begins."""


@dataclass(frozen=True, eq=False)
class Built:
    """What a build yields.

    Attributes:
        bundle: With its worth in the provenance; not saved yet.
        report: Of the test split.
        counts: Of the judged rows.
        tried: Figures on select of every candidate, best first.
        seconds: Of each step.
    """

    bundle: ProbeBundle
    report: Report
    counts: SplitCounts
    tried: tuple[Mapping[str, Any], ...]
    seconds: Mapping[str, float]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Everything that a reader of the figures should know, in the bundle's own words."""
        return summary_of(self.bundle).warnings


def build_bundle(
    own: Loaded,
    recipe: BuildRecipe,
    material: Material,
    work: Workplace,
    *,
    judge: RowJudge,
    stage: Stage = lambda _name: None,
) -> Built:
    """Answer, label, locate, fit, select, certify and evaluate.

    Args:
        own: The protected model, in eval mode, with its tokenizer.
        recipe: What is made.
        material: Of its sources.
        work: Claimed for this recipe, data and model.
        judge: Labels the model's answers.
        stage: Told the name of each step.

    Raises:
        DataError: The answers leave a split without what it needs.
        CertificateError: The responses do not support an alpha.
    """
    clock = _Clock(stage)
    rows = clock.run("answers", lambda: judged_rows(own, recipe, material, work, judge))
    counts = counts_of(rows)
    require_enough(counts, recipe)
    warnings = list(warnings_of(counts, recipe))
    units = clock.run("locate", lambda: _located(own, recipe, rows, counts, work, warnings))
    made = clock.run("fit and certify", lambda: _made(own, recipe, rows, units, work, material))
    warnings += [f"no certificate for {k}: {why}" for k, why in made.calibration.refused.items()]
    report = clock.run("evaluate", lambda: _evaluated(own, recipe, made.bundle, rows))
    worth = worth_of(
        report.test,
        maxima(list(report.paths)),
        report.certificate,
        is_located=is_located(made.tried[0]["sites"]),
        warnings=warnings,
    )
    provenance = {
        **made.bundle.provenance,
        "worth": worth,
        "counts": counts.to_json(),
        "recipe": asdict(recipe),
        "made_by": __version__,
    }
    bundle = replace(made.bundle, provenance=provenance)
    return Built(bundle, report, counts, made.tried, clock.seconds)


class _Clock:
    """Names the steps and takes their time."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.seconds: dict[str, float] = {}

    def run(self, name: str, step: Callable[[], Result]) -> Result:
        self._stage(name)
        begun = time.perf_counter()
        found = step()
        self.seconds[name] = round(time.perf_counter() - begun, 1)
        return found


def _located(
    own: Loaded,
    recipe: BuildRecipe,
    rows: Sequence[Conversation],
    counts: SplitCounts,
    work: Workplace,
    warnings: list[str],
) -> UnitSet | None:
    """Locate units where the recipe wants them and the refusals suffice."""
    if recipe.reading.where == "residual":
        return None
    if counts.refusals.get("locate", 0) < LEAST_REFUSALS:
        return None  # `warnings_of` has said so, or `require_enough` has refused
    here = [row for row in rows if row.split == "locate" and row.generation is not None]
    refusals = [row for row in here if row.refusal and row.prompt_harmful]
    calm = [row for row in here if not row.refusal and row.prompt_harmful is False]
    kept = work.path("located")
    kept.mkdir(exist_ok=True)
    try:
        return locate(
            own.model,
            own.tokenizer,
            refusals,
            calm,
            LocateConfig(min_refusals=LEAST_REFUSALS),
            kept=kept,
        )
    except UnsupportedError as error:
        if recipe.reading.where == "located":
            raise
        warnings.append(f"units cannot be located in this model: {error}")
        return None


def _made(
    own: Loaded,
    recipe: BuildRecipe,
    rows: Sequence[Conversation],
    units: UnitSet | None,
    work: Workplace,
    material: Material,
) -> Recipe:
    reading = recipe.reading
    config = RecipeConfig(
        envelope=_envelope(own, recipe),
        refusal=recipe.refusal,
        opener=recipe.opener,
        feature_counts=reading.features if units is not None else (),
        telling_counts=telling_counts(own, recipe) if reading.where != "residual" else (),
        extra_sites=site_candidates(own, recipe) if reading.where != "located" else {},
        fits=fits_for(reading),
        windows=(),
        statistics=statistics_of(list(reading.statistics) or None),
        alphas=recipe.alphas,
        default_alpha=recipe.alphas[0],
        delta=recipe.delta,
        located_within=_LOCATED_WITHIN,
        caps=recipe.caps,
        lower_caps=True,
    )
    return make_bundle(
        own.model,
        own.tokenizer,
        rows,
        config,
        provenance={"data": material.report},
        units=units,
        features=FeatureStore(work.path("activations")),
    )


def _envelope(own: Loaded, recipe: BuildRecipe) -> Envelope:
    """Say how the answers were generated; begun ones are longer by what was begun."""
    asked = rollout_config(recipe)
    return Envelope(
        max_new_tokens=asked.max_new_tokens,
        do_sample=asked.do_sample,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        options=record_of(own.model.generation_config, stop_ids(own.model, own.tokenizer)),
    )


def _evaluated(
    own: Loaded, recipe: BuildRecipe, bundle: ProbeBundle, rows: Sequence[Conversation]
) -> Report:
    """Count on the test split, beside what words alone give away."""
    parts = {name: [row for row in rows if row.split == name] for name in _EVALUATED}
    config = EvaluationConfig(
        prefixes=(None,),
        seed=recipe.seed,
        fit=fits_for(recipe.reading)[0],
        model_controls=False,
    )
    return evaluate_bundle(
        own.model,
        own.tokenizer,
        bundle,
        parts["test"],
        config,
        train=parts["fit"],
        calibrate=parts["calibrate"],
    )


_EVALUATED = ("fit", "calibrate", "test")


def work_identity(own: Loaded, recipe: BuildRecipe, material: Material) -> dict[str, object]:
    """Say what a work directory is of: the recipe, what its data held, and the weights."""
    return {
        "recipe": asdict(recipe),
        "data": material.digest,
        "weights": weights_digest(own.model),
    }
