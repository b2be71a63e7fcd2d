"""Where a recipe reads: units located by importance, channels that tell about harm, named layers.

Knows splits, what is asked for, and which of several candidates is preferred. Does not know how
probes are fitted.
"""

from __future__ import annotations

from collections.abc import Sequence

from probes.data.conversations import Conversation
from probes.data.sources import source_of
from probes.fitting.search import CandidateProbe
from probes.location.locate import LocateConfig, locate
from probes.location.telling import telling_channels
from probes.location.units import UnitSet, sites_of
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site
from safe_decode.typing import CausalLM, Tokenizer

__all__ = [
    "critical_sites",
    "has_refusals",
    "is_located",
    "located_first",
    "located_units",
    "telling_counts",
    "telling_sites",
]

_UNITS, _TELLING = "units-", "telling-"
"""Stand before the number of features in the name of a set of located units: by importance, and by
what they tell about harm."""


def located_units(
    model: CausalLM, tokenizer: Tokenizer, rows: Sequence[Conversation], config: LocateConfig
) -> UnitSet:
    """Locate units on refusals of harmful requests and answers to harmless ones."""
    refusals = [row for row in rows if row.refusal and row.prompt_harmful]
    benign = [
        row
        for row in rows
        if not row.refusal and not row.prompt_harmful and not row.response_harmful
    ]
    return locate(model, tokenizer, refusals, benign, config)


def has_refusals(rows: Sequence[Conversation]) -> bool:
    """Say whether the split locate holds refusals enough to locate units of importance."""
    refusals = {
        row.response for row in rows if row.split == "locate" and row.refusal and row.prompt_harmful
    }
    return len(refusals) >= LocateConfig().min_refusals


def telling_counts(model: CausalLM, layers: int = 4) -> tuple[int, ...]:
    """Read as many channels as one residual layer has, and as several of them."""
    width = anatomy_of(model).d_model
    return tuple(sorted({width, layers * width}))


def critical_sites(units: UnitSet, counts: Sequence[int]) -> dict[str, tuple[Site, ...]]:
    """Name the sites of the most safety-critical units, for each number of features."""
    return {f"{_UNITS}{count}": sites_of(units.most_critical(count)) for count in counts}


def telling_sites(
    model: CausalLM, tokenizer: Tokenizer, rows: Sequence[Conversation], counts: Sequence[int]
) -> dict[str, tuple[Site, ...]]:
    """Name the channels that tell most about harm on the fit split, for each number of them."""
    if not counts:
        return {}
    found = telling_channels(model, tokenizer, rows, [source_of(row) for row in rows])
    return {f"{_TELLING}{count}": found.most(count) for count in counts}


def is_located(sites_name: str) -> bool:
    """Say whether a set of sites was located, rather than named as whole layers."""
    return sites_name.startswith((_UNITS, _TELLING))


def located_first(
    candidates: Sequence[CandidateProbe], within: float | None
) -> list[CandidateProbe]:
    """Put the best candidate that reads located units first, where it is hardly behind.

    Args:
        candidates: Best first.
        within: Recall on select that it may be behind; None: located units have no precedence.
    """
    located = [one for one in candidates if is_located(one.sites_name)]
    if within is None or not located:
        return list(candidates)
    first = located[0]
    if candidates[0].chosen.recall - first.chosen.recall > within:
        return list(candidates)
    return [first, *(one for one in candidates if one is not first)]
