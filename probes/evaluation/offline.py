"""A bundle evaluated on finished responses: the probe among its controls, and when it trips.

Knows which split does what: controls are fitted on *fit*, get their thresholds on harmless
*calibrate* responses, and everything is counted on *test*. Does not know figures' arithmetic
or how a report looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.activations.teacher_forcing import EncodedResponse
from probes.calibration.statistic import maxima
from probes.data.conversations import Conversation
from probes.data.sources import source_of
from probes.evaluation.methods import Methods
from probes.fitting.interface import FitSettings
from probes.metrics.comparison import PROBE, Figures, MethodScores, ScoredRows, compare
from probes.metrics.detection import Delay, delay_of, rates_by_group
from probes.metrics.intervals import Proportion, plain_json
from safe_decode.bundle.bundle import Fingerprint, ProbeBundle
from safe_decode.certificate import Certificate, certified_threshold
from safe_decode.errors import CertificateError, DataError
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["EvaluationConfig", "Report", "Slice", "evaluate_bundle"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is computed.

    Attributes:
        prefixes: At most the first so many tokens; None is the whole response.
        fprs: False-positive rates a response at which recall is reported.
        draws: Of the cluster bootstrap.
        seed: Of the bootstrap, of shuffled labels and of random weights.
        alpha: Level of the certificate whose threshold is used; None: the default.
        population: Whose certificate that is.
        fit: How probes of the controls are fitted.
        model_controls: Whether controls that need forwards are run.
    """

    prefixes: tuple[int | None, ...] = (None, 32, 64, 128)
    fprs: tuple[float, ...] = (0.001, 0.01)
    draws: int = 1000
    seed: int = 0
    alpha: float | None = None
    population: str = "benign"
    fit: FitSettings
    model_controls: bool = True


@dataclass(frozen=True)
class Slice:
    """Methods side by side on some of the responses.

    Attributes:
        name: Which responses.
        prefix_tokens: How much of each was read; None for all.
        figures: One a method.
    """

    name: str
    prefix_tokens: int | None
    figures: tuple[Figures, ...]


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that was found, and what is needed to draw it.

    Attributes:
        slices: By prefix, over all responses and within harmful requests.
        delay: Of harmful responses with a known onset; None without any.
        holdback_tokens: At which leaked tokens were counted.
        recall_by_category: At the deployed threshold, worst first.
        alarms_by_population: Of harmless responses, worst first.
        certificate: Whose threshold is deployed.
        test: The responses.
        paths: [T + 1] smoothed statistic of each.
        onsets: Onset token of each, or None.
        encoded: Ids of each.
        scores: [n] of every method on whole responses, or on the first prefix asked for.
    """

    slices: tuple[Slice, ...]
    delay: Delay | None
    holdback_tokens: int
    recall_by_category: Mapping[str, Proportion]
    alarms_by_population: Mapping[str, Proportion]
    certificate: Certificate
    test: tuple[Conversation, ...]
    paths: tuple[NDArray[np.float32], ...]
    onsets: tuple[int | None, ...]
    encoded: tuple[EncodedResponse, ...]
    scores: Mapping[str, NDArray[np.float64]]

    def to_json(self) -> dict[str, Any]:
        """Return the figures; no text, no statistic of a single response."""
        found: dict[str, Any] = plain_json(
            {
                "responses": len(self.test),
                "threshold": self.certificate.threshold,
                "alpha": self.certificate.alpha,
                "delta": self.certificate.delta,
                "holdback_tokens": self.holdback_tokens,
                "slices": [asdict(one) for one in self.slices],
                "delay": None if self.delay is None else asdict(self.delay),
                "recall_by_category": _asdicts(self.recall_by_category),
                "alarms_by_population": _asdicts(self.alarms_by_population),
            }
        )
        return found


def evaluate_bundle(
    model: CausalLM,
    tokenizer: Tokenizer,
    bundle: ProbeBundle,
    test: Sequence[Conversation],
    config: EvaluationConfig,
    *,
    train: Sequence[Conversation] = (),
    calibrate: Sequence[Conversation] = (),
) -> Report:
    """Evaluate a bundle, teacher-forced.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        bundle: What is evaluated.
        test: Judged responses; rows that were not judged are left out.
        config: See `EvaluationConfig`.
        train: What controls are fitted on; none: no controls.
        calibrate: What thresholds of controls are set on; its harmless rows are used.

    Raises:
        DataError: Nothing judged, or one label only.
    """
    judged = _judged(test)
    harmless = [row for row in calibrate if row.response_harmful is False]
    work = Methods(
        model,
        tokenizer,
        bundle,
        train,
        [*judged, *harmless],
        fit=config.fit,
        seed=config.seed,
        model_controls=config.model_controls,
    )
    paths = work.paths()
    dtype = bundle.measured_as(Fingerprint.of(model, tokenizer)).dtype
    certificate = bundle.certificate(config.alpha, config.population, dtype)
    slices: list[Slice] = []
    shown: dict[str, NDArray[np.float64]] = {}
    for prefix in config.prefixes:
        scores = work.scores(paths, prefix)
        methods = _with_thresholds(scores, len(judged), certificate)
        slices += _slices(prefix, methods, judged, config)
        shown = shown or {name: method.scores for name, method in methods.items()}
    own, onsets = paths[: len(judged)], work.onsets(judged)
    return Report(
        slices=tuple(slices),
        delay=_delay(own, onsets, certificate.threshold, bundle.holdback_tokens),
        holdback_tokens=bundle.holdback_tokens,
        recall_by_category=_recall(own, judged, certificate.threshold),
        alarms_by_population=_alarms(own, judged, certificate.threshold),
        certificate=certificate,
        test=tuple(judged),
        paths=tuple(own),
        onsets=onsets,
        encoded=tuple(work.encoded[: len(judged)]),
        scores=shown,
    )


def _judged(test: Sequence[Conversation]) -> list[Conversation]:
    judged = [row for row in test if row.response_harmful is not None]
    labels = np.asarray([bool(row.response_harmful) for row in judged])
    if not labels.any() or labels.all():
        raise DataError(
            f"test holds {len(judged)} judged responses, {int(labels.sum())} of them harmful; "
            "give both kinds."
        )
    return judged


def _with_thresholds(
    scores: Mapping[str, NDArray[np.float64]], n_judged: int, certificate: Certificate
) -> dict[str, MethodScores]:
    """Set the threshold of each method: the certified one for the probe, else on harmless rows."""
    methods = {name: _calibrated(found, n_judged, certificate) for name, found in scores.items()}
    methods[PROBE] = MethodScores(methods[PROBE].scores, certificate.threshold)
    return methods


def _calibrated(scores: NDArray[np.float64], n_test: int, certificate: Certificate) -> MethodScores:
    """Set a control's threshold as the probe's was, on the harmless rows behind the test rows."""
    try:
        threshold = certified_threshold(
            scores[n_test:].tolist(), certificate.alpha, certificate.delta
        )
    except CertificateError:
        return MethodScores(scores[:n_test], None)
    return MethodScores(scores[:n_test], threshold)


def _slices(
    prefix: int | None,
    methods: Mapping[str, MethodScores],
    judged: Sequence[Conversation],
    config: EvaluationConfig,
) -> list[Slice]:
    options: dict[str, Any] = {"fprs": config.fprs, "draws": config.draws, "seed": config.seed}
    labels = np.asarray([bool(row.response_harmful) for row in judged])
    every = ScoredRows(labels, tuple(map(source_of, judged)), tuple(row.group for row in judged))
    found = [Slice("all responses", prefix, tuple(compare(methods, every, **options)))]
    asked = np.flatnonzero([row.prompt_harmful is True for row in judged])
    if len(set(labels[asked].tolist())) == 2:
        some = {n: MethodScores(m.scores[asked], m.threshold) for n, m in methods.items()}
        here = replace(every.take(asked), sources=("harmful requests",) * len(asked))
        found.append(
            Slice("within harmful requests", prefix, tuple(compare(some, here, **options)))
        )
    return found


def _delay(
    paths: Sequence[NDArray[np.float32]],
    onsets: Sequence[int | None],
    threshold: float,
    holdback_tokens: int,
) -> Delay | None:
    known = [(path, onset) for path, onset in zip(paths, onsets, strict=True) if onset is not None]
    if not known:
        return None
    return delay_of(
        [path for path, _ in known],
        [onset for _, onset in known],
        threshold=threshold,
        holdback_tokens=holdback_tokens,
    )


def _recall(
    paths: Sequence[NDArray[np.float32]], rows: Sequence[Conversation], threshold: float
) -> dict[str, Proportion]:
    chosen = [place for place, row in enumerate(rows) if row.response_harmful]
    names = [rows[place].category or "none" for place in chosen]
    peaks = maxima([paths[place] for place in chosen])
    shares = rates_by_group(peaks, names, threshold=threshold)
    return dict(sorted(shares.items(), key=lambda item: item[1].point))


def _alarms(
    paths: Sequence[NDArray[np.float32]], rows: Sequence[Conversation], threshold: float
) -> dict[str, Proportion]:
    chosen = [place for place, row in enumerate(rows) if not row.response_harmful]
    names = [str(rows[p].meta.get("population") or source_of(rows[p])) for p in chosen]
    peaks = maxima([paths[place] for place in chosen])
    shares = rates_by_group(peaks, names, threshold=threshold)
    return dict(sorted(shares.items(), key=lambda item: -item[1].point))


def _asdicts(shares: Mapping[str, Proportion]) -> dict[str, Any]:
    return {name: asdict(share) | {"point": share.point} for name, share in shares.items()}
