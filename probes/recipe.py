"""From labelled conversations and a model to a bundle: the whole path in one call.

locate -> harvest -> fit -> select -> calibrate. Each split is used for its own purpose
only, and calibrate is opened last, when nothing is left to choose.

Knows the order, the grid and what is recorded. Each step is a module of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.calibrate import Calibration, certify_populations, population_of
from probes.conversations import SPLITS, Conversation, Split, by_split
from probes.features import ResponseFeatures
from probes.fit import FitConfig, FittedProbe, LinearProbeFitter
from probes.harvest import harvest, score_responses
from probes.locate import LocateConfig, locate
from probes.select import Chosen, SelectSet, score_monitor
from probes.statistic import maxima, smoothed_paths
from probes.units import UnitSet, sites_of
from safe_decode.bundle import Fingerprint, ProbeBundle
from safe_decode.canary import CanaryRecord
from safe_decode.certificate import Envelope
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.sites import Site, n_features, sorted_sites

__all__ = ["Recipe", "RecipeConfig", "make_bundle", "union_of_sites"]

# Rounding of other kernels is far below a twentieth of the benign spread, a missing hook or
# another model far above it.
_CANARY_SHARE_OF_SPREAD = 0.05
_SMALLEST_CANARY_TOLERANCE = 1e-3

_DEFAULT_FITS = (
    FitConfig(method="token", c=0.01),
    FitConfig(method="token", c=0.1),
    FitConfig(method="windowed", c=0.1, window=4),
    FitConfig(method="windowed", c=0.1, window=8),
)


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What is tried and what is promised.

    Attributes:
        envelope: How the conversations were generated; certificates hold within it.
        refusal: Text a bundle refuses with.
        opener: Text with which the model is led into its own refusal.
        locate: See `LocateConfig`.
        feature_counts: Numbers of features at the most safety-critical units to try.
        extra_sites: Further sets of sites to try, by name, such as whole residual layers.
        fits: Ways of fitting to try.
        windows: Smoothing to try: an EMA that matches a window of so many tokens.
        alphas: Certified bounds on the false-alarm share of benign responses.
        default_alpha: The one a bundle uses unless told otherwise.
        delta: Chance that the bounds do not hold.
        holdback_share: Share of harmful select responses that a hold-back keeps clean.
        most_holdback_tokens: Patience has an end.
    """

    envelope: Envelope
    refusal: str
    opener: str
    locate: LocateConfig = field(default_factory=LocateConfig)
    feature_counts: tuple[int, ...] = (64, 256)
    extra_sites: Mapping[str, tuple[Site, ...]] = field(default_factory=dict)
    fits: tuple[FitConfig, ...] = _DEFAULT_FITS
    windows: tuple[int, ...] = (1, 2, 4, 8)
    alphas: tuple[float, ...] = (0.01,)
    default_alpha: float = 0.01
    delta: float = 0.05
    holdback_share: float = 0.9
    most_holdback_tokens: int = 16

    def __post_init__(self) -> None:
        if not (self.feature_counts or self.extra_sites) or not self.fits or not self.windows:
            raise ConfigurationError(
                "feature_counts or extra_sites, fits and windows must each name something to try."
            )
        if self.default_alpha not in self.alphas:
            raise ConfigurationError(
                f"default_alpha={self.default_alpha} is not among alphas={self.alphas}; add it."
            )
        if any(window < 1 for window in self.windows):
            raise ConfigurationError(f"windows={self.windows} must all be at least 1.")


@dataclass(frozen=True, eq=False)
class Recipe:
    """The bundle and what was seen on the way.

    Attributes:
        bundle: To save and serve.
        units: All units with their categories.
        tried: Figures on select of every candidate, best first.
        calibration: Certificates, and the reasons for those not given.
    """

    bundle: ProbeBundle
    units: UnitSet
    tried: tuple[Mapping[str, Any], ...]
    calibration: Calibration


class _Candidate(NamedTuple):
    sites_name: str
    fitted: FittedProbe
    chosen: Chosen

    def to_json(self) -> dict[str, Any]:
        return {
            "sites": self.sites_name,
            "features": n_features(self.fitted.probe.sites),
            "fit": asdict(self.fitted.config),
            "dead_features": self.fitted.dead_features,
            "converged": self.fitted.converged,
            **self.chosen.to_json(),
        }


def make_bundle(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    conversations: Iterable[Conversation],
    config: RecipeConfig,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> Recipe:
    """Make a bundle for a model from its own labelled responses.

    Rows that were not judged are left out and counted. The test split is not touched.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        conversations: On-policy, with splits assigned.
        config: See `RecipeConfig`.
        provenance: Further JSON for the bundle, such as seeds and data digests.

    Raises:
        DataError: A split lacks what its step needs.
        CertificateError: Too few benign responses in calibrate for an alpha.
    """
    parts, unjudged = _judged(conversations)
    units = _located(model, tokenizer, parts["locate"], config.locate)
    site_sets = _site_sets(units, config)
    every_site = union_of_sites(site_sets.values())
    fit_features = harvest(model, tokenizer, parts["fit"], every_site, storage="float16")
    select_features = harvest(model, tokenizer, parts["select"], every_site, storage="float16")
    labels = SelectSet(
        tuple(_is_harmful(row) for row in parts["select"]),
        select_features.onset_tokens,
        tuple(_population(row) for row in parts["select"]),
    )
    fit_labels = [_is_harmful(row) for row in parts["fit"]]
    candidates = sorted(
        _candidates(site_sets, fit_features, fit_labels, select_features, labels, config),
        key=lambda candidate: candidate.chosen.rank(),
        reverse=True,
    )
    best = candidates[0]
    calibration = _calibrated(model, tokenizer, parts["calibrate"], best, config)
    tried = tuple(candidate.to_json() for candidate in candidates)
    canary = _canary(model, tokenizer, parts["select"], best)
    bundle = ProbeBundle(
        probe=best.fitted.probe,
        monitor=best.chosen.monitor,
        certificates=calibration.certificates,
        default_alpha=config.default_alpha,
        holdback_tokens=best.chosen.holdback_tokens,
        refusal=config.refusal,
        opener=config.opener,
        fingerprint=Fingerprint.of(model, tokenizer),
        canary=canary,
        provenance={
            **(provenance or {}),
            "splits": {split: len(parts[split]) for split in SPLITS},
            "unjudged": unjudged,
            "units": {**units.provenance, "counts": units.counts()},
            "select": list(tried),
            "certificates_refused": calibration.refused,
            "delta": config.delta,
        },
    )
    return Recipe(bundle, units, tried, calibration)


def union_of_sites(site_sets: Iterable[Sequence[Site]]) -> tuple[Site, ...]:
    """Name every channel that stands in at least one of the sets."""
    channels: dict[tuple[int, Any], set[int]] = {}
    for sites in site_sets:
        for site in sites:
            channels.setdefault((site.layer, site.kind), set()).update(site.channels)
    return sorted_sites(
        Site(layer, kind, tuple(sorted(found))) for (layer, kind), found in channels.items()
    )


class _Judged(NamedTuple):
    parts: dict[Split, list[Conversation]]
    unjudged: int


def _judged(conversations: Iterable[Conversation]) -> _Judged:
    parts, unjudged = by_split(conversations), 0
    for split, rows in parts.items():
        kept = [row for row in rows if row.response_harmful is not None]
        unjudged += len(rows) - len(kept)
        parts[split] = kept
    for split in ("locate", "fit", "select", "calibrate"):
        if not parts[split]:
            raise DataError(f"the split {split!r} holds no judged response; add some.")
    return _Judged(parts, unjudged)


def _located(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    rows: Sequence[Conversation],
    config: LocateConfig,
) -> UnitSet:
    refusals = [row for row in rows if row.refusal and row.prompt_harmful]
    benign = [
        row
        for row in rows
        if not row.refusal and not row.prompt_harmful and not row.response_harmful
    ]
    return locate(model, tokenizer, refusals, benign, config)


def _site_sets(units: UnitSet, config: RecipeConfig) -> dict[str, tuple[Site, ...]]:
    located = {
        f"units-{count}": sites_of(units.most_critical(count)) for count in config.feature_counts
    }
    return {**located, **config.extra_sites}


def _candidates(
    site_sets: Mapping[str, tuple[Site, ...]],
    fit_features: ResponseFeatures,
    fit_labels: Sequence[bool],
    select_features: ResponseFeatures,
    labels: SelectSet,
    config: RecipeConfig,
) -> Iterator[_Candidate]:
    for name, sites in site_sets.items():
        here, there = fit_features.at(sites), select_features.at(sites)
        for fit in config.fits:
            fitted = LinearProbeFitter(fit).fit(here, fit_labels)
            logits = [_logits(fitted, values) for values in there.responses]
            for window in config.windows:
                chosen = score_monitor(
                    logits,
                    labels,
                    smoothing=2 / (window + 1),
                    start=fitted.benign_mean,
                    fpr=config.default_alpha,
                    holdback_share=config.holdback_share,
                    most_holdback_tokens=config.most_holdback_tokens,
                )
                yield _Candidate(name, fitted, chosen)


def _logits(fitted: FittedProbe, values: Any) -> Tensor:  # noqa: ANN401 - a float16 array
    return fitted.probe(torch.from_numpy(values))


def _calibrated(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    rows: Sequence[Conversation],
    best: _Candidate,
    config: RecipeConfig,
) -> Calibration:
    """Open the calibrate split: its harmless responses, under what was chosen."""
    harmless = [row for row in rows if row.response_harmful is False]
    device = next(model.parameters()).device
    logits = score_responses(model, tokenizer, harmless, best.fitted.probe.to(device))
    return certify_populations(
        harmless,
        maxima(smoothed_paths(logits, best.chosen.monitor)),
        alphas=config.alphas,
        delta=config.delta,
        envelope=config.envelope,
    )


def _canary(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    rows: Sequence[Conversation],
    best: _Candidate,
) -> CanaryRecord:
    """Record the scores of a harmless exchange, to be compared wherever the bundle is loaded."""
    row = next(row for row in rows if row.response_harmful is False and row.response)
    spread = max(best.chosen.monitor.scale)
    return CanaryRecord.of(
        model,
        tokenizer,
        best.fitted.probe.to(next(model.parameters()).device),
        prompt=row.prompt,
        response=row.response,
        tolerance=max(_CANARY_SHARE_OF_SPREAD * spread, _SMALLEST_CANARY_TOLERANCE),
    )


def _is_harmful(row: Conversation) -> bool:
    return row.response_harmful is True


def _population(row: Conversation) -> str:
    return "harmful" if row.response_harmful else population_of(row)
