"""From labelled conversations and a model to a bundle: the whole path in one call.

locate -> harvest -> fit -> select -> calibrate. Each split is used for its own purpose
only, and calibrate is opened last, when nothing is left to choose.

Knows the order, the grid and what is recorded. Each step is a module of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from probes.activations.features import union_of_sites
from probes.activations.harvest import score_responses
from probes.calibration.canary import canary_of
from probes.calibration.certify import Calibration, certify_populations
from probes.calibration.detection import detection_bounds
from probes.calibration.reach import Responses
from probes.calibration.statistic import smoothed_paths
from probes.data.conversations import SPLITS, Conversation, Split, by_split
from probes.fitting.interface import FitSettings
from probes.fitting.linear import FitConfig
from probes.fitting.search import CandidateProbe, FeatureStore, Search, ranked_candidates
from probes.fitting.statistics import StatisticChoice
from probes.location.locate import LocateConfig
from probes.location.units import UnitSet
from probes.recipes.reading import (
    critical_sites,
    located_first,
    located_units,
    telling_sites,
)
from probes.recipes.records import seen_prompts
from safe_decode.activations.site import Site
from safe_decode.bundle.bundle import Fingerprint, ProbeBundle
from safe_decode.bundle.worth import DetectionBound
from safe_decode.certificate import Envelope
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["FeatureStore", "Recipe", "RecipeConfig", "make_bundle", "union_of_sites"]

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
        telling_counts: Numbers of channels to try that tell most about harm on fit.
        extra_sites: Further sets of sites to try, by name, such as whole residual layers.
        fits: Ways of fitting to try, of one kind of probe or several.
        windows: Smoothing to try: an EMA that matches a window of so many tokens.
        statistics: Further statistics to try.
        c_grid: Where not empty, each way of fitting takes the C of it that does best on the
            fit split, groups left out in turn, instead of its own.
        by_category: Try, beside one head for all harm, a further one for each category.
        alphas: Certified bounds on the false-alarm share of benign responses.
        default_alpha: The one a bundle uses unless told otherwise.
        delta: Chance that the bounds do not hold.
        holdback_share: Share of harmful select responses that a hold-back keeps clean.
        most_holdback_tokens: The largest hold-back to choose, used too where no onset is known.
        envelopes: Of populations whose responses were generated otherwise, by name.
        caps: Smaller caps to certify too; a call takes the smallest that covers it.
        lower_caps: Lower a cap that the responses do not support, rather than refuse it.
        located_within: Recall on select that located units may be behind other sites and still
            be read; None: they have no precedence.
    """

    envelope: Envelope
    refusal: str
    opener: str
    locate: LocateConfig = field(default_factory=LocateConfig)
    feature_counts: tuple[int, ...] = (64, 256)
    telling_counts: tuple[int, ...] = ()
    extra_sites: Mapping[str, tuple[Site, ...]] = field(default_factory=dict)
    fits: tuple[FitSettings, ...] = _DEFAULT_FITS
    windows: tuple[int, ...] = (1, 2, 4, 8)
    statistics: tuple[StatisticChoice, ...] = ()
    c_grid: tuple[float, ...] = ()
    by_category: bool = False
    alphas: tuple[float, ...] = (0.01,)
    default_alpha: float = 0.01
    delta: float = 0.05
    holdback_share: float = 0.9
    most_holdback_tokens: int = 16
    envelopes: Mapping[str, Envelope] = field(default_factory=dict)
    caps: tuple[int, ...] = ()
    lower_caps: bool = False
    located_within: float | None = None

    def __post_init__(self) -> None:
        if not (self.feature_counts or self.telling_counts or self.extra_sites) or not self.fits:
            raise ConfigurationError(
                "feature_counts, telling_counts or extra_sites, and fits, must each name something "
                "to try."
            )
        if not (self.windows or self.statistics):
            raise ConfigurationError("windows or statistics must name something to try.")
        if self.default_alpha not in self.alphas:
            raise ConfigurationError(
                f"default_alpha={self.default_alpha} is not among alphas={self.alphas}; add it."
            )
        if any(window < 1 for window in self.windows):
            raise ConfigurationError(f"windows={self.windows} must all be at least 1.")

    def search(self) -> Search:
        """Return what is tried on fit and select."""
        averages = tuple(StatisticChoice(window=window) for window in self.windows)
        return Search(
            fits=self.fits,
            statistics=(*averages, *self.statistics),
            c_grid=self.c_grid,
            by_category=self.by_category,
            fpr=self.default_alpha,
            holdback_share=self.holdback_share,
            most_holdback_tokens=self.most_holdback_tokens,
        )


@dataclass(frozen=True, eq=False)
class Recipe:
    """The bundle and what was seen on the way.

    Attributes:
        bundle: To save and serve.
        units: All units with their categories; None where none were asked for.
        tried: Figures on select of every candidate, best first.
        calibration: Certificates, and the reasons for those not given.
    """

    bundle: ProbeBundle
    units: UnitSet | None
    tried: tuple[Mapping[str, Any], ...]
    calibration: Calibration


def make_bundle(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Iterable[Conversation],
    config: RecipeConfig,
    *,
    provenance: Mapping[str, Any] | None = None,
    units: UnitSet | None = None,
    features: FeatureStore | None = None,
) -> Recipe:
    """Make a bundle for a model from its own labelled responses; others are left out and counted.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        conversations: On-policy, with splits assigned.
        config: See `RecipeConfig`.
        provenance: Further JSON for the bundle, such as seeds and data digests.
        units: Located before; None: locate on the locate split, where the config wants units.
        features: Where activations are kept while fitting; None: in memory.

    Raises:
        DataError: A split lacks what its step needs.
        CertificateError: Too few benign responses in calibrate for an alpha.
        ConfigurationError: A kind of probe does not support what the config or `features` ask.
    """
    search, features = config.search(), features or FeatureStore()
    search.require_supported(features)
    parts, unjudged = _judged(conversations, locating=bool(config.feature_counts and not units))
    if config.feature_counts and units is None:
        units = located_units(model, tokenizer, parts["locate"], config.locate)
    sites = {} if units is None else critical_sites(units, config.feature_counts)
    sites |= telling_sites(model, tokenizer, parts["fit"], config.telling_counts)
    sites |= config.extra_sites
    splits = parts["fit"], parts["select"]
    ranked = ranked_candidates(model, tokenizer, *splits, sites, search, features)
    candidates = located_first(ranked, config.located_within)
    best = candidates[0]
    calibration, finds = _calibrated(model, tokenizer, parts["calibrate"], best, config)
    tried = tuple(candidate.to_json() for candidate in candidates)
    bundle = ProbeBundle(
        probe=best.fitted.probe,
        monitor=best.chosen.monitor,
        certificates=calibration.certificates,
        default_alpha=config.default_alpha,
        holdback_tokens=best.chosen.holdback_tokens,
        refusal=config.refusal,
        opener=config.opener,
        fingerprint=Fingerprint.of(model, tokenizer),
        canary=canary_of(model, tokenizer, parts["select"], best.fitted.probe, best.chosen.monitor),
        provenance={
            **(provenance or {}),
            **_counts(parts, unjudged),
            **_origin(units, tried, calibration),
            **{"delta": config.delta, "finds": [asdict(one) for one in finds]},
        },
        seen=seen_prompts(parts),
    )
    return Recipe(bundle, units, tried, calibration)


def _counts(parts: Mapping[Split, Sequence[Conversation]], unjudged: int) -> dict[str, Any]:
    return {
        "splits": {split: len(parts[split]) for split in SPLITS},
        "unjudged": unjudged,
        "calibrated": sum(row.response_harmful is False for row in parts["calibrate"]),
    }


def _origin(
    units: UnitSet | None, tried: Sequence[Mapping[str, Any]], calibration: Calibration
) -> dict[str, Any]:
    return {
        "units": None if units is None else {**units.provenance, "counts": units.counts()},
        "select": list(tried),
        "certificates_refused": calibration.refused,
        "not_of_this_model": calibration.foreign,
    }


class _Judged(NamedTuple):
    parts: dict[Split, list[Conversation]]
    unjudged: int


def _judged(conversations: Iterable[Conversation], *, locating: bool) -> _Judged:
    parts, unjudged = by_split(conversations), 0
    for split, rows in parts.items():
        kept = [row for row in rows if row.response_harmful is not None]
        unjudged += len(rows) - len(kept)
        parts[split] = kept
    for split in ("locate", "fit", "select", "calibrate"):
        if not parts[split] and (locating or split != "locate"):
            raise DataError(f"the split {split!r} holds no judged response; add some.")
    return _Judged(parts, unjudged)


def _calibrated(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    best: CandidateProbe,
    config: RecipeConfig,
) -> tuple[Calibration, tuple[DetectionBound, ...]]:
    """Open the calibrate split, under what was chosen.

    Harmless responses set the thresholds, and harmful ones say what these find.
    """
    harmless = [row for row in rows if row.response_harmful is False]
    harmful = [row for row in rows if row.response_harmful is True]
    probe = best.fitted.probe.to(next(model.parameters()).device)
    logits = score_responses(model, tokenizer, harmless, probe)
    calibration = certify_populations(
        harmless,
        smoothed_paths(logits, best.chosen.monitor),
        alphas=config.alphas,
        delta=config.delta,
        envelope=config.envelope,
        envelopes=config.envelopes,
        caps=config.caps,
        responses=Responses.scored(model, logits),
        lower_caps=config.lower_caps,
    )
    found = smoothed_paths(score_responses(model, tokenizer, harmful, probe), best.chosen.monitor)
    return calibration, detection_bounds(
        harmful, found, calibration.certificates, delta=config.delta
    )
