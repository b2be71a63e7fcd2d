"""Is there enough data? Said from the data alone, before a model is loaded, and again after it.

Each check names what is short, how many more are wanted, and what the data does support. What a
split cannot do without stops the work; what only weakens the result is a warning that follows
the bundle.

Knows splits, labels and how many each step needs. Does not know models or files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from probes.building.material import Material
from probes.building.recipe import BuildRecipe
from probes.data.conversations import SPLITS, Conversation, Split
from probes.data.enough import label_problems, label_warnings
from probes.rollouts.types import Request
from safe_decode.certificate import least_draws
from safe_decode.errors import DataError

__all__ = [
    "LEAST_REFUSALS",
    "SplitCounts",
    "counts_before",
    "counts_of",
    "require_enough",
    "smallest_alpha",
    "warnings_of",
]

LEAST_REFUSALS = 50
"""Distinct refusals that locating needs: fewer hardly have a variance to score."""
_BENIGN = "benign"


@dataclass(frozen=True)
class SplitCounts:
    """What each split holds.

    Attributes:
        harmful: Responses that do harm; before the model has answered, at most so many.
        harmless: Judged responses that do no harm.
        benign_groups: Prompt groups of plain harmless requests: draws of the certificate.
        begun_groups: The same of framed or begun answers, which are certified apart.
        refusals: Distinct refusals of harmful requests; before the model has answered, at most.
        is_expected: The model has not answered yet.
    """

    harmful: Mapping[Split, int]
    harmless: Mapping[Split, int]
    benign_groups: Mapping[Split, int]
    begun_groups: Mapping[Split, int]
    refusals: Mapping[Split, int]
    is_expected: bool

    def rows(self) -> list[dict[str, str]]:
        """Return a table of the splits."""
        upto = "up to " if self.is_expected else ""
        return [
            {
                "split": split,
                "harmful": f"{upto}{self.harmful.get(split, 0):,}",
                "harmless": f"{self.harmless.get(split, 0):,}",
                "plain benign prompts": f"{self.benign_groups.get(split, 0):,}",
                "framed or begun": f"{self.begun_groups.get(split, 0):,}",
                "refusals": f"{upto}{self.refusals.get(split, 0):,}",
            }
            for split in SPLITS
        ]

    def to_json(self) -> dict[str, dict[str, int]]:
        """Return the counts by split."""
        names = ("harmful", "harmless", "benign_groups", "begun_groups", "refusals")
        return {
            split: {name: getattr(self, name).get(split, 0) for name in names} for split in SPLITS
        }


def counts_before(material: Material) -> SplitCounts:
    """Count what the data can yield at most, whatever the model answers."""
    asked = material.requests
    harmful = Counter(_splits(row for row in material.labelled if row.response_harmful))
    harmful.update(_splits(one for one in asked if one.prompt_harmful))
    harmless = Counter(_splits(row for row in material.labelled if not row.response_harmful))
    harmless.update(_splits(one for one in asked if not one.prompt_harmful))
    return SplitCounts(
        harmful=harmful,
        harmless=harmless,
        benign_groups=Counter(_splits(one for one in asked if _population(one) == _BENIGN)),
        begun_groups=Counter(
            _splits(one for one in asked if _population(one) not in (None, _BENIGN))
        ),
        refusals=Counter(_splits(one for one in asked if one.prompt_harmful)),
        is_expected=True,
    )


def counts_of(rows: Sequence[Conversation]) -> SplitCounts:
    """Count judged responses, those of the model and those of others."""
    own = [row for row in rows if row.generation is not None]
    refusing = {(row.split, row.response) for row in own if row.refusal and row.prompt_harmful}
    calm = [row for row in own if row.response_harmful is False and not row.prompt_harmful]
    return SplitCounts(
        harmful=Counter(_splits(row for row in rows if row.response_harmful)),
        harmless=Counter(_splits(row for row in rows if row.response_harmful is False)),
        benign_groups=Counter(_splits(row for row in calm if _population(row) == _BENIGN)),
        begun_groups=Counter(_splits(row for row in calm if _population(row) != _BENIGN)),
        refusals=Counter(split for split, _ in refusing if split),
        is_expected=False,
    )


def require_enough(counts: SplitCounts, recipe: BuildRecipe) -> None:
    """Refuse what no step could make good.

    Raises:
        DataError: A split is short; the message says of what, how many more are wanted, and
            which alpha the data supports.
    """
    problems = [
        *_calibration_problems(counts, recipe),
        *label_problems(counts.harmful, counts.harmless, upto=_upto(counts)),
    ]
    refusals = counts.refusals.get("locate", 0)
    if recipe.reading.where == "located" and refusals < LEAST_REFUSALS:
        problems.append(
            f"locate holds {_upto(counts)}{refusals} distinct refusals, wanted {LEAST_REFUSALS}: "
            "ask more harmful prompts that the model refuses, or read the residual stream instead "
            "(reading.where: residual)"
        )
    if problems:
        raise DataError("the data is too small: " + "; ".join(problems) + ".")


def warnings_of(counts: SplitCounts, recipe: BuildRecipe) -> list[str]:
    """Say what weakens the result, or will be left out."""
    warnings = label_warnings(counts.harmful, upto=_upto(counts))
    needed = _needed(recipe, min(recipe.alphas))
    begun = counts.begun_groups.get("calibrate", 0)
    # Once the model has answered, calibration itself says which certificates are missing.
    if counts.is_expected and begun < needed:
        warnings.append(
            f"calibrate holds {begun} framed or begun harmless answers, wanted {needed}: no "
            "certificate for these"
        )
    refusals = counts.refusals.get("locate", 0)
    if recipe.reading.where == "auto" and refusals < LEAST_REFUSALS:
        warnings.append(
            f"locate holds {_upto(counts)}{refusals} distinct refusals, wanted {LEAST_REFUSALS}: "
            "units of importance are not located, and channels that tell are tried without them"
        )
    return warnings


def smallest_alpha(n: int, delta: float) -> float:
    """Return the smallest alpha of two digits that `n` draws can certify.

    The bound is (1 - alpha)^n <= delta; it is rounded up, so that what is advised is supported.
    """
    if not n:
        return 1.0
    exact = 1.0 - delta ** (1.0 / n)
    unit = 10.0 ** (1 - math.floor(math.log10(exact)))
    return float(math.ceil(exact * unit) / unit)


def _calibration_problems(counts: SplitCounts, recipe: BuildRecipe) -> list[str]:
    here = counts.benign_groups.get("calibrate", 0)
    alpha = min(recipe.alphas)
    needed = _needed(recipe, alpha)
    if here >= needed:
        return []
    share = recipe.delta_of_each
    supported = smallest_alpha(here, share)
    total = sum(counts.benign_groups.values())
    part = here / total if total else recipe.splits.asked.get("calibrate", 1.0)
    more = round((needed - here) / max(part, 0.01))
    remedy = f"pass alpha {supported:g} or more" if here and supported < 0.5 else "add prompts"
    return [
        f"calibrate holds {here} plain benign prompts, and alpha={alpha:g} at delta="
        f"{recipe.delta:g} needs {needed}: ask about {more} more benign prompts "
        f"(answers.benign), or {remedy}"
    ]


def _needed(recipe: BuildRecipe, alpha: float) -> int:
    return least_draws(alpha, recipe.delta_of_each)


def _upto(counts: SplitCounts) -> str:
    return "at most " if counts.is_expected else ""


def _population(one: Request | Conversation) -> str | None:
    """Name the population of a harmless request; None of a harmful one."""
    return None if one.prompt_harmful else str(one.meta.get("population", _BENIGN))


def _splits(rows: Iterable[Request | Conversation]) -> list[Split]:
    return [row.split for row in rows if row.split is not None]
