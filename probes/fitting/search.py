"""Every way of fitting and watching that is tried, ranked on the select split.

Knows the grid, where activations are kept meanwhile, and the order of the work. Does not
know how one probe is fitted, how one monitor is measured, or what becomes of the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.activations.features import ResponseFeatures, union_of_sites
from probes.activations.harvest import harvest, harvest_to, score_responses
from probes.activations.teacher_forcing import (
    EncodedResponse,
    encode_response,
    onset_token,
    teacher_forced,
)
from probes.calibration.certify import population_of
from probes.data.conversations import Conversation
from probes.fitting.cross_validation import choose_c
from probes.fitting.interface import Ability, FitSettings, FittedProbe
from probes.fitting.multi_head import fit_heads
from probes.fitting.registry import fitter_class, fitter_for, require_abilities, settings_record
from probes.fitting.selection import ChosenMonitor, SelectSet, score_monitor
from probes.fitting.statistics import StatisticChoice
from probes.fitting.store import FeatureStore
from safe_decode.activations.site import Site, n_features
from safe_decode.certificate_choice import BEGUN
from safe_decode.errors import ConfigurationError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = [
    "CandidateProbe",
    "FeatureStore",
    "Search",
    "fits_of",
    "ranked_candidates",
]


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is tried; see `recipes.bundle.RecipeConfig` for the fields."""

    fits: tuple[FitSettings, ...]
    statistics: tuple[StatisticChoice, ...]
    c_grid: tuple[float, ...]
    by_category: bool
    fpr: float
    holdback_share: float
    most_holdback_tokens: int

    def require_supported(self, store: FeatureStore) -> None:
        """Check, before anything is read, that every way of fitting can do what is asked.

        Raises:
            ConfigurationError: A kind cannot, or it would be fitted many times over a stream.
        """
        asked: dict[Ability, bool] = {
            "streamed": store.recompute,
            "penalty": bool(self.c_grid),
            "heads": self.by_category,
        }
        require_abilities(self.fits, [name for name, is_asked in asked.items() if is_asked])
        if store.recompute and (self.by_category or self.c_grid):
            raise ConfigurationError(
                "a grid of C and heads by category fit many times over; store the activations, "
                "or name one C and no categories."
            )


class CandidateProbe(NamedTuple):
    """A probe with its monitor.

    Attributes:
        sites_name: Which set of sites.
        fitted: The probe.
        chosen: The monitor and its figures on select.
        aurocs: Of each C of the grid, where one was searched.
    """

    sites_name: str
    fitted: FittedProbe
    chosen: ChosenMonitor
    aurocs: Mapping[float, float]

    def to_json(self) -> dict[str, Any]:
        """Return the figures for the bundle's provenance."""
        searched = {"c_aurocs": {str(c): value for c, value in self.aurocs.items()}}
        return {
            "sites": self.sites_name,
            "features": n_features(self.fitted.probe.sites),
            "heads": list(self.fitted.probe.heads),
            "fit": settings_record(self.fitted.config),
            "way": self.fitted.config.label,
            **(searched if self.aurocs else {}),
            "dead_features": self.fitted.dead_features,
            "converged": self.fitted.converged,
            **self.chosen.to_json(),
        }


class _Fitted(NamedTuple):
    sites_name: str
    fitted: FittedProbe
    logits: list[Tensor]
    aurocs: Mapping[float, float]


def ranked_candidates(
    model: CausalLM,
    tokenizer: Tokenizer,
    fit_rows: Sequence[Conversation],
    select_rows: Sequence[Conversation],
    site_sets: Mapping[str, tuple[Site, ...]],
    search: Search,
    store: FeatureStore,
) -> list[CandidateProbe]:
    """Fit everything on one split, measure everything on the other, best first.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        fit_rows: Judged, of the fit split.
        select_rows: Judged, of the select split.
        site_sets: Where to read, by name.
        search: What is tried.
        store: Where activations are meanwhile.

    Raises:
        DataError: A split holds only one label.
        ConfigurationError: As `Search.require_supported`.
    """
    search.require_supported(store)
    labels = SelectSet(
        tuple(row.response_harmful is True for row in select_rows),
        tuple(onset_token(tokenizer, row, encode_response(tokenizer, row)) for row in select_rows),
        tuple(_population(row) for row in select_rows),
    )
    fits = _recomputed if store.recompute else _stored
    found = [
        CandidateProbe(one.sites_name, one.fitted, chosen, one.aurocs)
        for one in fits(model, tokenizer, fit_rows, select_rows, site_sets, search, store)
        for chosen in _chosen(one, labels, search)
    ]
    return sorted(found, key=lambda candidate: candidate.chosen.rank(), reverse=True)


def _population(row: Conversation) -> str:
    if not row.response_harmful:
        return population_of(row)
    is_begun = bool(row.prefill_tokens) or row.meta.get("population") == BEGUN
    return BEGUN if is_begun else "harmful"


def _chosen(one: _Fitted, labels: SelectSet, search: Search) -> Iterator[ChosenMonitor]:
    for statistic in search.statistics:
        yield score_monitor(
            one.logits,
            labels,
            choice=statistic,
            start=one.fitted.benign_mean,
            fpr=search.fpr,
            holdback_share=search.holdback_share,
            most_holdback_tokens=search.most_holdback_tokens,
        )


def _stored(
    model: CausalLM,
    tokenizer: Tokenizer,
    fit_rows: Sequence[Conversation],
    select_rows: Sequence[Conversation],
    site_sets: Mapping[str, tuple[Site, ...]],
    search: Search,
    store: FeatureStore,
) -> Iterator[_Fitted]:
    rows = (*fit_rows, *select_rows)
    positions = sum(encode_response(tokenizer, row).n_scores for row in rows)
    n_bytes = 2 * positions * n_features(union_of_sites(site_sets.values()))
    with store.place(n_bytes) as place:
        yield from _fitted_at(place, model, tokenizer, fit_rows, select_rows, site_sets, search)


def _fitted_at(
    place: Path | None,
    model: CausalLM,
    tokenizer: Tokenizer,
    fit_rows: Sequence[Conversation],
    select_rows: Sequence[Conversation],
    site_sets: Mapping[str, tuple[Site, ...]],
    search: Search,
) -> Iterator[_Fitted]:
    every_site = union_of_sites(site_sets.values())

    def kept(name: str, rows: Sequence[Conversation]) -> ResponseFeatures:
        if place is None:
            return harvest(model, tokenizer, rows, every_site, storage="float16")
        return harvest_to(place / name, model, tokenizer, rows, every_site)

    fit_features, select_features = kept("fit", fit_rows), kept("select", select_rows)
    harmful = [row.response_harmful is True for row in fit_rows]
    groups = [row.group for row in fit_rows]
    categories = [row.category for row in fit_rows]
    for name, sites in site_sets.items():
        here, there = fit_features.at(sites), select_features.at(sites)
        for config in search.fits:
            aurocs: Mapping[float, float] = {}
            if search.c_grid and config.has_penalty:
                c, aurocs = choose_c(here, harmful, groups, config, grid=search.c_grid)
                chosen: Any = {"c": c}
                config = replace(config, **chosen)  # noqa: PLW2901 - the same way of fitting
            fitted = [fitter_for(config).fit(here, harmful, groups=groups)]
            if search.by_category:
                heads = fit_heads(here, harmful, categories, config, groups=groups)
                fitted += [heads] if len(heads.probe.heads) > 1 else []
            for one in fitted:
                # Copied: what is memory-mapped cannot be lent to torch.
                values = (np.array(v, dtype=np.float32) for v in there.responses)
                logits = [one.probe(torch.from_numpy(v)) for v in values]
                yield _Fitted(name, one, logits, aurocs)


def _recomputed(
    model: CausalLM,
    tokenizer: Tokenizer,
    fit_rows: Sequence[Conversation],
    select_rows: Sequence[Conversation],
    site_sets: Mapping[str, tuple[Site, ...]],
    search: Search,
    store: FeatureStore,  # noqa: ARG001 - as in `_stored`
) -> Iterator[_Fitted]:
    encoded = [encode_response(tokenizer, row) for row in fit_rows]
    pairs = zip(fit_rows, encoded, strict=True)
    onsets = [onset_token(tokenizer, row, ids) for row, ids in pairs]
    harmful = [row.response_harmful is True for row in fit_rows]
    device = next(model.parameters()).device
    for name, sites in site_sets.items():
        for config in search.fits:
            fitted = fitter_for(config).fit_streamed(
                lambda sites=sites: _stream(model, sites, encoded),  # type: ignore[misc]
                sites,
                [row.n_scores for row in encoded],
                onsets,
                harmful,
            )
            probe = fitted.probe.to(device)
            logits = score_responses(model, tokenizer, select_rows, probe)
            yield _Fitted(name, fitted, logits, {})


def _stream(
    model: CausalLM, sites: Sequence[Site], encoded: Sequence[EncodedResponse]
) -> Iterator[list[tuple[int, Any]]]:
    for batch in teacher_forced(model, sites, encoded, description="recomputing"):
        on_cpu = batch._replace(features=batch.features.cpu())
        yield [(row, on_cpu.of(index).numpy()) for index, row in enumerate(batch.rows)]


def fits_of(methods: Sequence[str] | None, c: float | None, probe: str) -> tuple[FitSettings, ...]:
    """Name the ways of fitting to try.

    Args:
        methods: Of the kind of probe, for `linear` see `linear.Method`; None for all.
        c: Inverse strength of the penalty; None for the kind's default.
        probe: The kind of probe; see `probes.fitting.registry`.

    Raises:
        ConfigurationError: There is no such kind, or it has no such method or no such penalty.
    """
    return fitter_class(probe).ways(methods or None, c)
