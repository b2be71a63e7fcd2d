"""Adversarial refitting: learn from prompts that got around the guard, certify anew.

The prompts that an attack found are answered by the bare model and judged, and so are harmless
requests that end in the same suffixes: otherwise a probe would learn to know suffixes, and
every user who types gibberish would pay. Probe, monitor and hold-back are fitted and chosen
again at the bundle's own sites; calibration is drawn anew from responses without attacks, as
the certificate speaks of those.

Knows responses and the order of the steps. Does not know how attacks were found. Whether
anything was gained is for a new attack, from scratch, on other behaviours, to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from probes.activations.harvest import harvest, score_responses
from probes.activations.teacher_forcing import encode_response, onset_token
from probes.attacks.behaviours import AttackSet
from probes.attacks.results import Record
from probes.calibration.canary import canary_of
from probes.calibration.certify import Calibration, certify_populations, population_of
from probes.calibration.reach import Responses
from probes.calibration.statistic import smoothed_paths
from probes.data.conversations import Conversation, Message, Split, by_split
from probes.fitting.interface import FitSettings, FittedProbe
from probes.fitting.linear import FitConfig
from probes.fitting.registry import fitter_for, settings_from
from probes.fitting.selection import ChosenMonitor, SelectSet, score_monitor
from probes.rollouts.generate import RolloutConfig, rollout
from probes.rollouts.types import Judge, Request
from safe_decode.activations.site import Site
from safe_decode.bundle.bundle import Fingerprint, ProbeBundle
from safe_decode.errors import DataError
from safe_decode.prompts.chat import encode_chat
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["RefitConfig", "adversarial_requests", "fit_config_of", "refit"]

_DELTA = 0.05
_SEEDS_OF_A_DRAW = 100_000  # `rollout` takes a seed a batch


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """How a probe is fitted again.

    Attributes:
        fit: Of the probe.
        windows: Smoothing to try: an EMA that matches a window of so many tokens.
        answers: How often each adversarial prompt is answered, each time with other draws.
        sites: What is read from then on; None: what the bundle reads.
        holdback_share: See the recipe.
        most_holdback_tokens: See the recipe.
        rollout: How the adversarial prompts are answered.
    """

    fit: FitSettings
    windows: tuple[int, ...] = (1, 2, 4, 8)
    answers: int = 8
    sites: tuple[Site, ...] | None = None
    holdback_share: float = 0.9
    most_holdback_tokens: int = 16
    rollout: RolloutConfig


def adversarial_requests(
    records: Sequence[Record],
    attack_set: AttackSet,
    benign: Sequence[tuple[Message, ...]],
) -> list[Request]:
    """Make requests of the prompts that were found, and of harmless ones with their suffixes.

    Args:
        records: With prompts kept.
        attack_set: What was attacked.
        benign: Harmless requests; suffixes go to them in turn.

    Raises:
        DataError: No record holds a prompt, or one is of a behaviour that is not in the set.
    """
    plain = {behaviour.name: behaviour for behaviour in attack_set.behaviours}
    requests: list[Request] = []
    for number, record in enumerate(r for r in records if r.arm == "guarded"):
        behaviour = plain.get(record.behaviour)
        if behaviour is None:
            raise DataError(
                f"the records attack {record.behaviour!r}, which is not among the behaviours "
                "drawn; pass the count, seed and file that the attack was given."
            )
        for place, prompt in enumerate(record.prompts):
            group = f"attack-{record.threat}-{record.behaviour}-{place}"
            begun = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else None
            messages = prompt if begun is None else prompt[:-1]
            category = behaviour.category
            requests.append(_request(messages, group, category, prefill=begun, harmful=True))
            suffix = messages[-1]["content"].removeprefix(behaviour.request)
            if suffix in ("", messages[-1]["content"]) or not benign:
                continue
            other = benign[(number + place) % len(benign)]
            ended = {"role": "user", "content": other[-1]["content"] + suffix}
            twin = (*other[:-1], ended)
            requests.append(_request(twin, f"{group}-twin", None, prefill=None, harmful=False))
    if not requests:
        raise DataError("no record holds a prompt; run the attack with prompts kept.")
    return requests


def refit(
    model: CausalLM,
    tokenizer: Tokenizer,
    bundle: ProbeBundle,
    rows: Sequence[Conversation],
    requests: Sequence[Request],
    judge: Judge,
    config: RefitConfig,
) -> ProbeBundle:
    """Fit, choose and certify again, with adversarial responses among those fitted.

    Args:
        model: The protected model.
        tokenizer: Its tokenizer.
        bundle: Whose sites, levels and texts are kept.
        rows: Judged conversations with splits; fit, select and calibrate are used.
        requests: Adversarial ones, from `adversarial_requests`.
        judge: Of whole responses.
        config: See `RefitConfig`.

    Raises:
        DataError: A split is empty.
        CertificateError: Too few harmless responses in calibrate.
    """
    parts = _judged_parts(rows)
    old, bundle = bundle, bundle.only_as(Fingerprint.of(model, tokenizer))
    fitting = _within_context(model, tokenizer, requests, config.rollout.max_new_tokens)
    hostile = [
        row
        for draw in range(config.answers)
        for row in rollout(
            model,
            tokenizer,
            fitting,
            judge=judge,
            config=replace(config.rollout, seed=config.rollout.seed + draw * _SEEDS_OF_A_DRAW),
        )
        if row.response_harmful is not None
    ]
    taught = [*parts["fit"], *hostile]
    sites = config.sites or bundle.probe.sites
    features = harvest(model, tokenizer, taught, sites, storage="float16")
    labels, groups = [bool(row.response_harmful) for row in taught], [row.group for row in taught]
    fitted = fitter_for(config.fit).fit(features, labels, groups=groups)
    chosen = _chosen(model, tokenizer, parts["select"], fitted, bundle.default_alpha, config)
    calibration = _calibrated(model, tokenizer, parts["calibrate"], fitted, chosen, bundle)
    return replace(
        bundle,
        probe=fitted.probe,
        monitor=chosen.monitor,
        certificates=calibration.certificates,
        holdback_tokens=chosen.holdback_tokens,
        canary=canary_of(model, tokenizer, parts["select"], fitted.probe, chosen.monitor),
        provenance={
            **bundle.provenance,
            "refitted_from": old.digest,
            "adversarial_rows": len(hostile),
            "adversarial_harmful": sum(bool(row.response_harmful) for row in hostile),
        },
    )


def fit_config_of(bundle: ProbeBundle) -> FitSettings:
    """Return the configuration that a bundle was fitted with, or the default if it is not told."""
    told = bundle.provenance.get("select")
    if not isinstance(told, list) or not told or "fit" not in told[0]:
        return FitConfig()
    return settings_from(told[0]["fit"])


def _within_context(
    model: CausalLM,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    cap: int,
) -> list[Request]:
    """Leave out prompts that fill the context: attacks may have run under a lower cap."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return list(requests)
    return [
        request
        for request in requests
        if len(encode_chat(tokenizer, request.messages, prefill=request.prefill).ids) + cap <= limit
    ]


def _judged_parts(rows: Sequence[Conversation]) -> dict[Split, list[Conversation]]:
    parts = {
        split: [row for row in found if row.response_harmful is not None]
        for split, found in by_split(rows).items()
    }
    needed: tuple[Split, ...] = ("fit", "select", "calibrate")
    for split in needed:
        if not parts[split]:
            raise DataError(f"the split {split!r} holds no judged response; add some.")
    return parts


def _chosen(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    fitted: FittedProbe,
    fpr: float,
    config: RefitConfig,
) -> ChosenMonitor:
    """Choose the smoothing on select, as the recipe does."""
    logits = score_responses(model, tokenizer, rows, fitted.probe.to(model.device))
    encoded = [encode_response(tokenizer, row) for row in rows]
    labels = SelectSet(
        tuple(bool(row.response_harmful) for row in rows),
        tuple(onset_token(tokenizer, row, ids) for row, ids in zip(rows, encoded, strict=True)),
        tuple("harmful" if row.response_harmful else population_of(row) for row in rows),
    )
    tried = [
        score_monitor(
            logits,
            labels,
            smoothing=2 / (window + 1),
            start=fitted.benign_mean,
            fpr=fpr,
            holdback_share=config.holdback_share,
            most_holdback_tokens=config.most_holdback_tokens,
        )
        for window in config.windows
    ]
    return max(tried, key=lambda chosen: chosen.rank())


def _calibrated(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    fitted: FittedProbe,
    chosen: ChosenMonitor,
    bundle: ProbeBundle,
) -> Calibration:
    harmless = [row for row in rows if row.response_harmful is False]
    logits = score_responses(model, tokenizer, harmless, fitted.probe.to(model.device))
    return certify_populations(
        harmless,
        smoothed_paths(logits, chosen.monitor),
        alphas=sorted({c.alpha for c in bundle.certificates if c.population == "benign"}),
        delta=float(bundle.provenance.get("delta", _DELTA)),
        envelope=bundle.certificate().envelope,
        envelopes={c.population: c.envelope for c in bundle.certificates},
        responses=Responses.scored(model, logits),
        lower_caps=True,
    )


def _request(
    messages: tuple[Message, ...],
    group: str,
    category: str | None,
    *,
    prefill: str | None,
    harmful: bool,
) -> Request:
    return Request(
        messages=messages,
        group=group,
        prefill=prefill,
        prompt_harmful=harmful,
        category=category,
        split="fit",
        meta={"situation": "adversarial"},
    )
