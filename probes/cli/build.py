"""`safe-decode build`: from the name of a model to a bundle that says what it is worth.

Knows the options, the order of the checks and how plan and outcome are shown. Does not know how
any step is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json, require_place, working, write_text
from safe_decode.cli.options import JsonOptions, ModelOptions
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from probes.building.builder import Built
    from probes.building.material import Material
    from probes.building.pace import Pace
    from probes.building.plan import Plan
    from probes.building.recipe import BuildRecipe
    from probes.building.workplace import Workplace
    from safe_decode.loading import Loaded, ModelSizes

__all__ = ["build"]

_REPORT = "report"
_SHOWN = 3  # tables on the screen; the page has all


@dataclass(frozen=True, kw_only=True)
class BuildOptions(ModelOptions, JsonOptions):
    """Options of `safe-decode build`."""

    out: Annotated[
        Path,
        typer.Option(
            help="Directory that the bundle is written to, with report.html and report.json."
        ),
    ]
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe: the name of a shipped one, or a YAML file. Without it: --data says "
            "which conversations are used, and all else has its default."
        ),
    ] = None
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Judged conversations and prompts: a file, or hf:NAME[:split]. May be given "
            "several times, instead of a recipe."
        ),
    ] = None
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory that the files of a recipe are in. Without it: the directory of the "
            "recipe's file, or the present one."
        ),
    ] = None
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            help="False-alarm rate to certify; the first becomes the default. May be given "
            "several times. Without it: as in the recipe, 0.01."
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer, in tokens. Without it: as in the recipe."),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of draws and splits. Without it: as in the recipe.")
    ] = None
    work: Annotated[
        Path | None,
        typer.Option(
            help="Directory that keeps finished work; a build that was ended goes on from it. "
            "Without it: OUT.work, beside the bundle."
        ),
    ] = None
    plan: Annotated[
        bool, typer.Option(help="Show what would be done, from the data alone, and stop.")
    ] = False

    def recipe_of(self) -> BuildRecipe:
        """Read the recipe, and put the options in the place of its fields.

        Raises:
            ConfigurationError: Neither a recipe nor data, or both, or a field that is wrong.
        """
        from probes.building.recipe import BuildRecipe, Source, read_recipe, recipe_names

        if (self.recipe is None) == (not self.data):
            raise ConfigurationError(
                f"--recipe={self.recipe!r} and --data={self.data!r}: pass exactly one of them; "
                f"shipped recipes are {', '.join(recipe_names())}."
            )
        if self.recipe is not None:
            found = read_recipe(self.recipe)
        else:
            found = BuildRecipe(sources=tuple(Source(data=one) for one in self.data or ()))
        if self.max_new_tokens is not None:
            answers = replace(found.answers, max_new_tokens=self.max_new_tokens)
            found = replace(found, answers=answers)
        if self.alpha:
            found = replace(found, alphas=tuple(self.alpha))
        return found if self.seed is None else replace(found, seed=self.seed)

    def folder(self) -> Path:
        """Return what the recipe's files are relative to."""
        if self.data_dir is not None:
            return self.data_dir
        is_file = self.recipe is not None and Path(self.recipe).is_file()
        return Path(self.recipe or "").parent if is_file else Path()

    def workplace(self) -> Workplace:
        """Return where finished work is kept."""
        from probes.building.workplace import Workplace

        return Workplace(self.work or self.out.with_name(f"{self.out.name}.work"))


@command("Make a probe")
def build(options: BuildOptions) -> None:
    """Make a bundle: ask the model, locate, fit, certify, and say what the bundle is worth."""
    _require_out(options.out)
    from probes.building.counts import counts_before, require_enough, warnings_of
    from probes.building.labels import judge_for
    from probes.building.material import gathered
    from probes.building.plan import plan_of
    from probes.cli.tables.planned import plan_json, show_plan

    recipe, work = options.recipe_of(), options.workplace()
    judge = judge_for(recipe.labels)
    with working("Reading"):
        material = gathered(recipe, options.folder())
    counts, plan = counts_before(material), plan_of(material, recipe)
    if not options.as_json:
        show_plan(material, counts, plan, warnings_of(counts, recipe))
    require_enough(counts, recipe)
    _require_model(options, recipe, plan, work)
    if options.plan:
        if options.as_json:
            print_json(plan_json(material, counts, plan, warnings_of(counts, recipe)))
        return
    from probes.building.builder import build_bundle, work_identity
    from probes.building.tries import require_tries

    require_tries(recipe)
    own = options.load_model()
    work.claim(work_identity(own, recipe, material))
    if not options.as_json:
        _show_pace(own, recipe, material, plan, work)
    built = build_bundle(own, recipe, material, work, judge=judge, stage=_told)
    _finish(built, options, recipe)


def _require_out(out: Path) -> None:
    """Check, before any work, that a bundle can be written there."""
    from safe_decode.bundle.files import is_bundle

    require_place(out.absolute().parent / "file")
    if out.exists() and not is_bundle(out):
        raise ConfigurationError(
            f"--out={out} is there and is no bundle; pass a new directory, or that of a bundle."
        )


def _require_model(options: BuildOptions, recipe: BuildRecipe, plan: Plan, work: Workplace) -> None:
    """Read the model's small files; refuse what its weights could not mend."""
    from probes.building.workplace import require_disk
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.loading import sizes_of

    name = options.model or artefact("aligned")
    facts = sizes_of(name, options.how, needs_template=True)
    if facts.context is not None and recipe.answers.max_new_tokens >= facts.context:
        raise ConfigurationError(
            f"max_new_tokens={recipe.answers.max_new_tokens} leaves no room for a prompt in this "
            f"model's {facts.context} positions; pass --max-new-tokens {facts.context // 2}."
        )
    outside = [
        layer
        for layer in recipe.reading.layers or ()
        if facts.layers is not None and not 0 <= layer < facts.layers
    ]
    if outside:
        raise ConfigurationError(
            f"reading.layers={list(recipe.reading.layers or ())} names layer {outside[0]}, and "
            f"this model has 0..{(facts.layers or 1) - 1}; mend the recipe."
        )
    require_disk(work.folder.absolute(), plan.kept_bytes(_features(facts, recipe)))


def _features(facts: ModelSizes, recipe: BuildRecipe) -> int:
    """Count the features that are kept at most."""
    layers = len(recipe.reading.layers or range(4))
    residual = 0 if recipe.reading.where == "located" else layers * (facts.width or 0)
    units = 0 if recipe.reading.where == "residual" else max(recipe.reading.features)
    return residual + units


def _show_pace(
    own: Loaded, recipe: BuildRecipe, material: Material, plan: Plan, work: Workplace
) -> None:
    """Time the first batch, and say how long the rest takes."""
    from probes.building.answers import rollout_config
    from probes.building.pace import measured_pace

    if not material.requests or work.path("answers.jsonl").exists():
        return
    pace: Pace = measured_pace(own.model, own.tokenizer, material.requests, rollout_config(recipe))
    minutes = pace.minutes(plan)
    told = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    console(stderr=True).print(
        f"minutes, measured on the first batch: {told}; then fitting", soft_wrap=True
    )


def _told(stage: str) -> None:
    console(stderr=True).print(f"step: {stage}", style="dim")


def _finish(built: Built, options: BuildOptions, recipe: BuildRecipe) -> None:
    """Write the bundle and its page, and show what it is worth."""
    from probes.cli.tables.built import build_tables
    from probes.reports.build_page import build_json, build_page

    bundle = replace(built.bundle, made=datetime.now(UTC).date().isoformat())
    built = replace(built, bundle=bundle)
    bundle.save(options.out)
    facts = _facts(built, options, recipe)
    tables = build_tables(built)
    write_text(options.out / f"{_REPORT}.html", build_page(built, tables, facts))
    found = build_json(built, facts)
    write_text(options.out / f"{_REPORT}.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    if options.as_json:
        print_json({"out": str(options.out), **found})
        return
    from probes.cli.tables.facts import show_warnings
    from probes.cli.tables.figures import print_tables

    shown = list(tables.items())[:_SHOWN]
    print_tables(dict(shown))
    show_warnings((), list(built.warnings))
    model = "" if options.model is None else f" --model {options.model}"
    console().print(
        f"wrote {options.out}; the whole page: {options.out / f'{_REPORT}.html'}\n"
        f"serve it: safe-decode serve{model} --bundle {options.out}",
        soft_wrap=True,
    )


def _facts(built: Built, options: BuildOptions, recipe: BuildRecipe) -> Mapping[str, str]:
    from safe_decode import __version__

    bundle, chosen = built.bundle, built.tried[0]
    return {
        "model": options.model or "embedded, aligned",
        "bundle": bundle.digest,
        "made": f"{bundle.made} by safe-decode {__version__}",
        "recipe": recipe.about or options.recipe or "--data",
        "reads": f"{chosen['sites']}, {chosen['features']:,} features",
        "statistic": str(chosen["statistic"]),
        "judge of the model's answers": recipe.labels.judge,
        "hold-back": f"{bundle.holdback_tokens} tokens",
        "seed": str(recipe.seed),
    }
