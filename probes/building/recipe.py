"""Recipes: which data a bundle is made of, how the model is asked, and what is tried.

A recipe is a YAML file. Those that ship with the project stand in `probes/building/recipes`.

Knows the fields of a recipe and refuses what it does not know. Does not read data.
"""

from __future__ import annotations

import os
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from probes.data.conversations import Split
from safe_decode.errors import ConfigurationError

__all__ = [
    "Answers",
    "BuildRecipe",
    "Labels",
    "ProbeReading",
    "Shares",
    "Source",
    "Use",
    "read_recipe",
    "recipe_names",
]

Use = Literal["labelled", "prompts"]
"""labelled: judged responses are fitted, selected and reported on. prompts: the model answers."""

Where = Literal["auto", "located", "residual"]
"""auto: located units, those of importance where the model refuses often enough, and the residual
stream; located ones are preferred where they are hardly behind."""

_KNOWN = ConfigDict(extra="forbid")
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(pattern=r"\S")]


def _once(alphas: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(alphas)) < len(alphas):
        raise ValueError("each rate is wanted once")
    return alphas


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class Source:
    """One set of conversations.

    Attributes:
        data: A file of any known format, relative to the data directory, or `hf:NAME[:split]`.
        columns: As the option `--columns`.
        use: What its rows are for.
        prompt_harmful: Label by origin of requests that have none.
        response_harmful: Label by origin of responses that have none.
        rows: The most rows that are used, drawn by a hash of their group; None: all.
    """

    data: str
    columns: str = "auto"
    use: Annotated[tuple[Use, ...], Field(min_length=1)] = ("labelled", "prompts")
    prompt_harmful: bool | None = None
    response_harmful: bool | None = None
    rows: Count | None = None


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class Answers:
    """How the model is asked, and how it answers: as it will be when served.

    Attributes:
        benign: Harmless prompts that are asked, at most.
        harmful: Harmful prompts that are asked, at most.
        framed: Share of both whose request stands in a framing.
        prefilled: Share of both whose answer is begun for the model.
        max_new_tokens: The cap of an answer; certificates reach as far.
        temperature: Of the sampling; 0: greedy decoding.
        top_p: Share of probability that sampling keeps.
        top_k: Tokens that sampling keeps; 0: all.
        batch_size: Answers that are generated together.
    """

    benign: int = Field(default=1600, ge=0)
    harmful: int = Field(default=400, ge=0)
    framed: Share = 0.15
    prefilled: Share = 0.15
    max_new_tokens: Count = 256
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    batch_size: Count = 32


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class Labels:
    """Who says what an answer of the model is.

    Attributes:
        judge: `rule`, `module:function`, or the base URL of an endpoint.
        judge_model: With an endpoint: the model that judges.
        key_variable: With an endpoint: environment variable that holds its key.
        at_once: With an endpoint: requests that are sent at the same time.
        harmful_patterns: With the rule: regular expressions of harmful text.
        refusal_phrases: With the rule: phrases that open a refusal, besides the built-in ones.
        answers_to_harm_are_harm: With the rule: an answer to a harmful request that does not
            refuse counts as harmful.
    """

    judge: str = "rule"
    judge_model: str = ""
    key_variable: str = "OPENAI_API_KEY"
    at_once: Count = 8
    harmful_patterns: tuple[str, ...] = ()
    refusal_phrases: tuple[str, ...] = ()
    answers_to_harm_are_harm: bool = True


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class Shares:
    """Shares of the splits, each by a hash of the group.

    Attributes:
        asked: Of prompts that the model answers.
        labelled: Of labelled responses to other prompts; they are neither located nor
            calibrated on, since the model did not write them.
    """

    asked: dict[Split, Share] = field(
        default_factory=lambda: {
            "locate": 0.2,
            "fit": 0.15,
            "select": 0.1,
            "calibrate": 0.4,
            "test": 0.15,
        }
    )
    labelled: dict[Split, Share] = field(
        default_factory=lambda: {"fit": 0.65, "select": 0.2, "test": 0.15}
    )


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class ProbeReading:
    """What is read of the model, and how a probe is fitted on it.

    Attributes:
        where: See `Where`.
        features: Numbers of features at the most critical units to try.
        telling: Numbers of channels to try that tell most about harm; None: as many as one of the
            residual layers offers, and as many as all of them together.
        layers: Layers whose residual stream is tried, each alone; None: four, evenly spread
            over the deeper two thirds.
        probe: Kind of probe.
        methods: Ways of fitting to try; None: all that the kind of probe has.
        statistics: Statistics to try; empty: all.
        c: Inverse strength of the penalty; None: the default of the kind.
    """

    where: Where = "auto"
    features: tuple[Count, ...] = (64, 256)
    telling: tuple[Count, ...] | None = None
    layers: tuple[int, ...] | None = None
    probe: str = "linear"
    methods: tuple[str, ...] | None = None
    statistics: tuple[str, ...] = ("ema", "shrunk", "bank")
    c: float | None = Field(default=None, gt=0.0)


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class BuildRecipe:
    """Everything that decides what a bundle becomes, beside the model.

    Attributes:
        about: What the recipe is, for people.
        sources: See `Source`.
        answers: See `Answers`.
        labels: See `Labels`.
        splits: See `Shares`.
        reading: See `ProbeReading`.
        alphas: False-alarm rates to certify; the first is the default.
        delta: Largest chance that the bounds of a population do not hold.
        caps: Lengths to certify beside the cap of the answers, where they are smaller; a call takes
            the smallest that covers it.
        refusal: Text that replaces an answer when the guard refuses.
        opener: First words of the new answer after a rewind.
        seed: Of draws and splits.
    """

    about: str = ""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    answers: Answers = field(default_factory=Answers)
    labels: Labels = field(default_factory=Labels)
    splits: Shares = field(default_factory=Shares)
    reading: ProbeReading = field(default_factory=ProbeReading)
    alphas: Annotated[
        tuple[Annotated[float, Field(gt=0.0, lt=0.5)], ...],
        Field(min_length=1),
        AfterValidator(_once),
    ] = (0.01,)
    delta: float = Field(default=0.05, gt=0.0, le=0.2)
    caps: tuple[Count, ...] = (64, 256, 1024)
    refusal: Text = "I can't help with that."
    opener: Text = "Sorry, I"
    seed: int = 0

    @property
    def delta_of_each(self) -> float:
        """The share of delta that each certificate of a population has."""
        n_caps = 1 + sum(cap < self.answers.max_new_tokens for cap in self.caps)
        return self.delta / (len(self.alphas) * n_caps)


_ADAPTER: TypeAdapter[BuildRecipe] = TypeAdapter(BuildRecipe)
_SHIPPED = "recipes"


def recipe_names() -> list[str]:
    """Name the recipes that ship with the project."""
    folder = resources.files("probes.building").joinpath(_SHIPPED)
    return sorted(one.name.removesuffix(".yaml") for one in folder.iterdir())


def read_recipe(name: str | os.PathLike[str]) -> BuildRecipe:
    """Read a recipe by the name of a shipped one, or from a file.

    Raises:
        ConfigurationError: There is none, it is not YAML, or a field is missing, unknown or of
            a wrong value; it is named.
    """
    told = os.fspath(name)
    if told in recipe_names():
        text = resources.files("probes.building").joinpath(_SHIPPED, f"{told}.yaml").read_text()
    else:
        try:
            text = Path(told).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"recipe={told!r} cannot be read: {error}; pass a YAML file, or one of "
                f"{', '.join(recipe_names())}."
            ) from error
    try:
        return _ADAPTER.validate_python(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"recipe={told!r} is not YAML: {error}; mend it.") from error
    except ValidationError as error:
        raise ConfigurationError(f"recipe={told!r}: {_named(error)}") from error


def _named(error: ValidationError) -> str:
    """Name every field that is wrong, what it holds, and what is wanted."""
    lines = []
    for one in error.errors():
        place = ".".join(map(str, one["loc"])) or "the file"
        given = "" if one["type"] == "missing" else f"={one['input']!r}"
        lines.append(f"{place}{given}: {one['msg'].lower()}")
    return "; ".join(lines) + ". See docs/guides/build.md for the fields."
