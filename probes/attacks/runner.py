"""Runs attacks: every threat, arm and behaviour, resumable, one record each.

Knows the order of the work and which arms a threat has. Does not know losses, how candidates
are made or how anything is shown.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from probes.attacks.behaviours import AttackSet, Behaviour
from probes.attacks.black_box import queries
from probes.attacks.config import ARMS, AttackConfig
from probes.attacks.deployment import AttackCandidate, Deployment, SoftGap
from probes.attacks.gcg import SuffixConfig, random_suffixes, search_suffix
from probes.attacks.objective import DetectorModel, Objective, TargetAnswer
from probes.attacks.prompt_gap import PromptGap, typeable_ids
from probes.attacks.results import AttackArm, Record, Threat, read_records, write_records
from probes.attacks.soft_prompt import carrier_of, search_soft_prompt
from probes.data.conversations import Message
from probes.evaluation.released_text import Reading
from probes.runs.progress import progress
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import ConfigurationError
from safe_decode.prompts.chat import text_ids

__all__ = ["attack", "jobs_of"]

_QUERIES_AT_ONCE = 16


class _Trial(NamedTuple):
    """Candidates that are tried together, and what had been spent by then."""

    spent: int
    candidates: tuple[AttackCandidate, ...]


def jobs_of(
    attack_set: AttackSet, config: AttackConfig
) -> list[tuple[Threat, AttackArm, Behaviour]]:
    """List what is to be run, threat by threat."""
    return [
        (threat, arm, behaviour)
        for threat in config.threats
        for arm in ARMS[threat]
        if arm in config.arms
        for behaviour in attack_set.behaviours
    ]


def attack(
    decoder: SafeDecoder,
    attack_set: AttackSet,
    judge: Reading,
    config: AttackConfig,
    *,
    surrogate: DetectorModel | None = None,
    journal: str | os.PathLike[str] | None = None,
) -> list[Record]:
    """Attack a deployed guard.

    Args:
        decoder: As deployed: its redirect, hold-back and level are those attacked.
        attack_set: What is wanted.
        judge: Of released text.
        config: See `AttackConfig`.
        surrogate: The attacker's own probe, for T2.
        journal: Records are written here after each behaviour, and found here again; those of
            threats and arms that are not asked for now stay there.

    Returns:
        The records of all jobs, in the order of `jobs_of`.

    Raises:
        ConfigurationError: T2 without a surrogate.
        DataError: The journal is of another attack.
    """
    if "T2" in config.threats and surrogate is None:
        raise ConfigurationError("T2 needs a surrogate; fit one, or leave T2 out.")
    identity = _identity(decoder, attack_set, config)
    records = [] if journal is None else read_records(journal, identity)
    done = {(record.threat, record.arm, record.behaviour) for record in records}
    jobs = jobs_of(attack_set, config)
    attacker = _Attacker(decoder, attack_set, judge, config, surrogate)
    with progress("attacking", len(jobs)) as advance:
        for threat, arm, behaviour in jobs:
            if (threat, arm, behaviour.name) not in done:
                records.append(attacker.run(threat, arm, behaviour))
                if journal is not None:
                    write_records(journal, identity, records)
            advance(1)
    found = {(record.threat, record.arm, record.behaviour): record for record in records}
    return [found[threat, arm, behaviour.name] for threat, arm, behaviour in jobs]


class _Attacker:
    """One attacker on one deployment."""

    def __init__(
        self,
        decoder: SafeDecoder,
        attack_set: AttackSet,
        judge: Reading,
        config: AttackConfig,
        surrogate: DetectorModel | None,
    ) -> None:
        self._decoder, self._set, self._config = decoder, attack_set, config
        self._judge, self._surrogate = judge, surrogate
        self._deployed = DetectorModel(
            decoder.bundle.probe.to(decoder.model.device),
            decoder.bundle.monitor,
            decoder.certificate.threshold,
        )
        self._vocab = decoder.model.get_input_embeddings().weight.shape[0]
        self._typeable = typeable_ids(decoder.tokenizer, self._vocab)

    def run(self, threat: Threat, arm: AttackArm, behaviour: Behaviour) -> Record:
        """Attack one behaviour until it gives way or the budget is spent."""
        began = time.monotonic()
        config = self._config
        deployment = Deployment(
            self._decoder,
            self._judge,
            is_guarded=arm != "bare",
            max_new_tokens=config.max_new_tokens,
            samples=config.samples,
            temperature=config.temperature,
            seed=config.seed,
        )
        spent, calls, trips, tried = 0, 0, 0, 0
        success_at, last = None, AttackCandidate(messages=(), asked=(), name="none")
        prompts: tuple[AttackCandidate, ...] = ()
        for draw, trial in enumerate(self._trials(threat, arm, behaviour, deployment.cap)):
            attempts = deployment.attempt(trial.candidates, draw=draw)
            prompts = trial.candidates
            tried += len(attempts)
            trips += sum(attempt.tripped for attempt in attempts)
            won = next((place for place, a in enumerate(attempts) if a.success), None)
            last = trial.candidates[-1 if won is None else won]
            calls += sum(attempt.queries for attempt in attempts)
            spent = trial.spent if threat != "T1" else calls
            if won is not None:
                if threat == "T1":  # what came after the success was not needed
                    spent -= sum(attempt.queries for attempt in attempts[won + 1 :])
                success_at, prompts = spent, (last,)
                break
        return Record(
            threat=threat,
            arm=arm,
            behaviour=behaviour.name,
            category=behaviour.category,
            budget=self._budget(threat),
            success_at=success_at,
            queries=calls,
            trips=trips,
            tried=tried,
            how=last.name,
            seconds=round(time.monotonic() - began, 2),
            prompts=tuple(map(_with_prefill, prompts)) if config.keeps_prompts else (),
        )

    def _budget(self, threat: Threat) -> int:
        config = self._config
        budgets = {"T1": config.black_box.queries * config.samples, "T4": config.soft.steps}
        return budgets.get(threat, config.suffix.steps)

    def _trials(
        self, threat: Threat, arm: AttackArm, behaviour: Behaviour, cap: int
    ) -> Iterator[_Trial]:
        if threat == "T1":
            return self._black_box(behaviour, cap)
        frame = PromptGap.around(self._decoder.tokenizer, behaviour.messages)
        if arm == "random":
            return self._suffixes(random_suffixes(frame, self._typeable, self._suffix), frame)
        watch = self._surrogate if threat == "T2" else self._deployed
        objective = self._objective(frame, behaviour, None if arm == "bare" else watch)
        if threat == "T4":
            return self._soft(objective, frame)
        search = search_suffix(objective, frame, self._typeable, self._suffix)
        return self._suffixes(search, frame)

    @property
    def _suffix(self) -> SuffixConfig:
        return replace(self._config.suffix, seed=self._config.seed)

    def _objective(
        self, frame: PromptGap, behaviour: Behaviour, watch: DetectorModel | None
    ) -> Objective:
        decoder, config = self._decoder, self._config
        target = text_ids(decoder.tokenizer, behaviour.target)[: config.target_tokens]
        answers = [TargetAnswer((), target)]
        if watch is not None and decoder.policy.redirect == "rewind" and config.redirect_weight:
            opener = text_ids(decoder.tokenizer, decoder.opener)
            answers.append(TargetAnswer(opener, target, config.redirect_weight))
        return Objective(decoder.model, frame, answers, watch=watch, weights=config.weights)

    def _black_box(self, behaviour: Behaviour, cap: int) -> Iterator[_Trial]:
        limit = getattr(self._decoder.model.config, "max_position_embeddings", None)
        room = limit - cap if isinstance(limit, int) else None
        found = queries(
            behaviour,
            self._set,
            self._decoder.tokenizer,
            self._config.black_box,
            context_tokens=room,
        )
        return (_Trial(0, part) for part in _parts(found, _QUERIES_AT_ONCE))

    def _suffixes(self, search: Iterable[Any], frame: PromptGap) -> Iterator[_Trial]:
        for point in search:
            candidates = tuple(
                AttackCandidate(messages=frame.filled(gap), asked=frame.messages, name="suffix")
                for gap in dict.fromkeys(point.gaps)
            )
            yield _Trial(point.step, candidates)

    def _soft(self, objective: Objective, frame: PromptGap) -> Iterator[_Trial]:
        config = replace(self._config.soft, seed=self._config.seed)
        carrier = carrier_of(self._decoder.tokenizer, self._vocab, frame.head + frame.tail)
        ids = (*frame.head, *[carrier] * config.vectors, *frame.tail)
        for point in search_soft_prompt(objective, config):
            candidates = tuple(
                AttackCandidate(
                    messages=frame.messages,
                    asked=frame.messages,
                    name="soft prompt",
                    soft=SoftGap(ids, carrier, vectors),
                )
                for vectors in point.vectors
            )
            yield _Trial(point.step, candidates)


def _with_prefill(candidate: AttackCandidate) -> tuple[Message, ...]:
    """A begun answer stands as a last message of the assistant, as chats write it."""
    if not candidate.prefill:
        return candidate.messages
    return (*candidate.messages, {"role": "assistant", "content": candidate.prefill})


def _parts(
    candidates: Iterator[AttackCandidate], size: int
) -> Iterator[tuple[AttackCandidate, ...]]:
    part: list[AttackCandidate] = []
    for candidate in candidates:
        part.append(candidate)
        if len(part) == size:
            yield tuple(part)
            part = []
    if part:
        yield tuple(part)


def _identity(decoder: SafeDecoder, attack_set: AttackSet, config: AttackConfig) -> dict[str, Any]:
    """Say what is attacked and how; records of another attack are not mixed with these.

    Which threats and arms are run is no part of it: each record says that itself.
    """
    how = json.loads(json.dumps(asdict(config)))
    budgets = {name: value for name, value in how.items() if name not in ("threats", "arms")}
    wanted = json.dumps([asdict(behaviour) for behaviour in attack_set.behaviours])
    return {
        "bundle": decoder.bundle.digest,
        "alpha": decoder.certificate.alpha,
        "population": decoder.certificate.population,
        "redirect": decoder.policy.redirect,
        "holdback_tokens": decoder.policy.holdback_tokens,
        "behaviours": hashlib.sha256(wanted.encode()).hexdigest()[:16],
        "config": budgets,
    }
