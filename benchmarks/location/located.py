"""Locating for studies: responses of the part `locate`, units, and what ablations need.

Knows the amounts a study locates on. Does not know what is done with the units.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from benchmarks.location.pair import Pair
from probes.analysis.behaviour import refusal_first_tokens
from probes.analysis.ratio_search import SearchData
from probes.data.conversations import Conversation
from probes.location.locate import LocateConfig, locate
from probes.location.units import UnitSet
from safe_decode.errors import DataError
from safe_decode.loading import Loaded

__all__ = ["LocatedOn", "located_on", "search_data"]


class LocatedOn(NamedTuple):
    """Units and the responses they were located on.

    Attributes:
        units: With the ratios of the configuration.
        refusals: For I_S.
        answers: For I_U.
        refusal_tokens: First tokens of sampled refusals: the likeliest opening hides the others.
    """

    units: UnitSet
    refusals: list[Conversation]
    answers: list[Conversation]
    refusal_tokens: tuple[int, ...]


def located_on(
    pair: Pair, loaded: Loaded, *, prompts: int, config: LocateConfig | None = None
) -> LocatedOn:
    """Locate on the aligned model's own refusals and answers.

    Raises:
        DataError: The model refuses too little.
    """
    harmful = pair.harmful(loaded.tokenizer, prompts, "locate")
    benign = pair.benign(loaded.tokenizer, prompts, "locate")
    refusals = [r for r in pair.answered(loaded, harmful, harmful=True) if r.refusal]
    answers = [
        row for row in pair.answered(loaded, benign, harmful=False) if row.meta["label"] == "benign"
    ]
    if not refusals or not answers:
        raise DataError(
            f"{pair.name} refuses {len(refusals)} of {len(harmful)} harmful prompts and answers "
            f"{len(answers)} of {len(benign)} benign ones; nothing to locate on."
        )
    distinct = len({row.response for row in refusals})
    config = config or LocateConfig()
    # A weak model's refusals are few; how many distinct ones there were stands in the record.
    config = replace(config, min_refusals=min(config.min_refusals, distinct))
    units = locate(loaded.model, loaded.tokenizer, refusals, answers, config)
    tokens = refusal_first_tokens(
        loaded.tokenizer,
        pair.answered(loaded, harmful, harmful=True, do_sample=True),
        pair.answered(loaded, benign, harmful=False, do_sample=True),
    )
    return LocatedOn(units, refusals, answers, tokens)


def search_data(pair: Pair, loaded: Loaded, found: LocatedOn, *, prompts: int) -> SearchData:
    """Gather what ratios are searched on: the part `search`."""
    harmful = pair.harmful(loaded.tokenizer, prompts, "search")
    benign = pair.benign(loaded.tokenizer, prompts, "search")
    said = pair.answered(loaded, benign, harmful=False)
    answers = [row for row in said if row.meta["label"] == "benign"]
    return SearchData(harmful, answers, found.refusal_tokens)
