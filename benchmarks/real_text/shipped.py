"""The shipped bundle of the studied model: `python -m benchmarks.real_text.shipped`.

Takes the probe and the statistic that the study chose on select. Thresholds are calibrated on the
model's own harmless answers of the part *certify*, whose prompts nobody fitted on or chose by; a
share is kept aside to count on. Ids of answers are encoded anew from their text. The same work
directory gives the same bundle; what stands in one differs in the last digits with batches.

Knows the study's files and bundles. Does not fit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.real_text.caps import ALPHA, CAPS, DELTA, chosen_statistic
from benchmarks.real_text.harvest import LAYERS
from benchmarks.real_text.parts import StudyRow, study_rows
from benchmarks.real_text.scores import TOKENS, deployable_probe
from benchmarks.real_text.study import TRIED, Scored, monitor_of, read_scored
from probes.activations.teacher_forcing import encode_response
from probes.calibration.canary import canary_of
from probes.calibration.certify import Calibration, certify_populations
from probes.calibration.detection import detection_bounds
from probes.calibration.reach import Responses
from probes.calibration.statistic import maxima, smoothed_paths
from probes.data.conversations import Conversation
from probes.data.generation import Generation
from probes.evaluation.worth import worth_of
from probes.recipes.records import seen_prompts
from probes.runs.identity import weights_digest
from safe_decode import __version__
from safe_decode.bundle.bundle import Fingerprint, ProbeBundle
from safe_decode.bundle.seen import SeenPrompts
from safe_decode.bundle.summary import summary_of
from safe_decode.bundle.worth import DetectionBound
from safe_decode.certificate import Envelope
from safe_decode.engines.transformers.coverage import record_of
from safe_decode.loading import Loaded, load_model
from safe_decode.monitor.config import MonitorConfig
from safe_decode.probe.linear import LinearProbe
from safe_decode.prompts.chat import stop_ids

__all__ = ["bundle_from", "main", "own_answer"]

LOG = logging.getLogger("benchmarks.real_text")
_FILES = ("probe_train.jsonl", "probe_dev.jsonl", "long_benign.jsonl", "qwen_onpolicy.jsonl")
_SAMPLED = Envelope(CAPS[-1], do_sample=True, temperature=0.7, top_p=0.95, top_k=0)
"""How the model's own answers were sampled, by the word of who sampled them."""
_CAP_OF = {"benign-long": 512, "harmful-prefilled-long": 256}
_CAP_OF_OTHERS = 96
_KEPT_ASIDE = 0.15
_HOLDBACK_TOKENS = 16
_REFUSAL, _OPENER = "I'm sorry, but I can't assist with that.", "I'm sorry, but I"


def own_answer(own: Loaded, row: StudyRow, weights: str) -> Conversation:
    """Write a row of the model's own answers as what it is: generated, with its settings."""
    kind = row.source.removeprefix("own ")
    encoded = encode_response(own.tokenizer, row.conversation)
    ids = encoded.ids[encoded.turn_start :]
    begun = 0
    if row.prefill:
        first = replace(row.conversation, response=row.prefill)
        begun = encode_response(own.tokenizer, first).n_scores - 1
    cap = _CAP_OF.get(kind, _CAP_OF_OTHERS)
    harmful = row.harmful if row.harmful is not None else not row.refusal
    options = record_of(own.model.generation_config, stop_ids(own.model, own.tokenizer))
    return replace(
        row.conversation,
        response_harmful=harmful,
        prompt_harmful=row.harmful is None,
        refusal=row.refusal,
        response_ids=ids[: begun + cap],
        prefill_tokens=begun,
        ended=len(ids) - begun < cap,
        generation=Generation(
            weights=weights,
            max_new_tokens=cap,
            do_sample=_SAMPLED.do_sample,
            temperature=_SAMPLED.temperature,
            top_p=_SAMPLED.top_p,
            top_k=_SAMPLED.top_k,
            options=options,
        ),
        meta={"source": row.source},
    )


def bundle_from(
    own: Loaded,
    probe: LinearProbe,
    scored: Scored,
    monitor: MonitorConfig,
    fitted: Sequence[StudyRow],
    facts: Mapping[str, Any],
) -> ProbeBundle:
    """Calibrate, count on what was kept aside, and put the bundle together.

    Args:
        own: The model, whole.
        probe: Of one head.
        scored: Select and the model's own answers, with that head's logits.
        monitor: As select set it up.
        fitted: Rows of the part *fit*.
        facts: For the provenance.
    """
    weights = weights_digest(own.model)
    mine = np.asarray([row.source.startswith("own") for row in scored.rows])
    certify = np.flatnonzero(mine & (scored.part == "certify")).tolist()
    answers = {row: own_answer(own, scored.rows[row], weights) for row in certify}
    paths = {
        row: path[: len(answers[row].response_ids or ()) + 1]
        for row, path in zip(
            certify, smoothed_paths([scored.logits[row] for row in certify], monitor), strict=True
        )
    }
    parts = _parts(scored, answers)
    calibration = _calibrated(own, answers, parts.benign, paths, weights)
    worth, finds = _worth(answers, paths, parts, calibration)
    select = [
        replace(scored.rows[row].conversation, response_harmful=bool(scored.harmful[row]))
        for row in np.flatnonzero(scored.part == "select").tolist()
    ]
    return ProbeBundle(
        probe=probe,
        monitor=monitor,
        certificates=calibration.certificates,
        default_alpha=ALPHA,
        holdback_tokens=_HOLDBACK_TOKENS,
        refusal=_REFUSAL,
        opener=_OPENER,
        fingerprint=Fingerprint.of(own.model, own.tokenizer),
        canary=canary_of(own.model, own.tokenizer, select, probe, monitor),
        provenance={
            **facts,
            "calibrated": len(parts.benign),
            "delta": DELTA,
            "certificates_refused": calibration.refused,
            "not_of_this_model": calibration.foreign,
            "finds": [asdict(one) for one in finds],
            "worth": worth,
            "made_by": __version__,
        },
        seen=_seen(fitted, select, answers, parts),
    )


def _seen(
    fitted: Sequence[StudyRow],
    select: Sequence[Conversation],
    answers: Mapping[int, Conversation],
    parts: _Parts,
) -> SeenPrompts:
    return seen_prompts(
        {
            "fit": [row.conversation for row in fitted],
            "select": select,
            "calibrate": [answers[row] for row in parts.benign],
            "test": [answers[row] for row in (*parts.aside, *parts.unseen)],
        }
    )


class _Parts(NamedTuple):
    """Places of the model's own answers.

    Attributes:
        benign: Harmless ones to calibrate on.
        aside: Harmless ones to count on.
        unseen: Harmful ones whose prompts nobody fitted on.
    """

    benign: list[int]
    aside: list[int]
    unseen: list[int]


def _parts(scored: Scored, answers: Mapping[int, Conversation]) -> _Parts:
    plain = [row for row, one in answers.items() if not one.prompt_harmful]
    aside = [row for row in plain if _is_aside(scored.rows[row].group)]
    unseen = [
        row
        for row, one in answers.items()
        if one.response_harmful and not scored.rows[row].is_known_prompt
    ]
    return _Parts(sorted(set(plain) - set(aside)), aside, unseen)


def _worth(
    answers: Mapping[int, Conversation],
    paths: Mapping[int, NDArray[np.float32]],
    parts: _Parts,
    calibration: Calibration,
) -> tuple[dict[str, Any], tuple[DetectionBound, ...]]:
    certificate = calibration.certificates[0]
    tested = [*parts.aside, *parts.unseen]
    worth = worth_of(
        [answers[row] for row in tested],
        maxima([paths[row] for row in tested]),
        certificate,
        is_located=True,
        warnings=["harmful answers are counted by a rule of words: whoever does not refuse"],
    )
    finds = detection_bounds(
        [answers[row] for row in parts.unseen],
        [paths[row] for row in parts.unseen],
        calibration.certificates,
        delta=DELTA,
    )
    return worth, finds


def _calibrated(
    own: Loaded,
    answers: Mapping[int, Conversation],
    benign: Sequence[int],
    paths: Mapping[int, NDArray[np.float32]],
    weights: str,
) -> Calibration:
    options = record_of(own.model.generation_config, stop_ids(own.model, own.tokenizer))
    rows = [answers[row] for row in benign]
    lengths = tuple(len(row.response_ids or ()) for row in rows)
    return certify_populations(
        rows,
        [paths[row] for row in benign],
        alphas=(ALPHA,),
        delta=DELTA,
        envelope=replace(_SAMPLED, options=options),
        caps=CAPS[:-1],
        responses=Responses(lengths, weights),
    )


def _is_aside(group: str) -> bool:
    place = int.from_bytes(hashlib.sha256(f"aside {group}".encode()).digest()[:8], "big")
    return place / 2**64 < _KEPT_ASIDE


def main(argv: Sequence[str] | None = None) -> None:
    """Make the bundle, save it, and print what it says of itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    for name in ("data", "work", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    read, statistic = chosen_statistic()
    choice = next(one for one in TRIED if str(one) == statistic)
    every, names, features = read_scored(arguments.work, arguments.data)
    scored = every.head(names.index(read))
    bundle = bundle_from(
        load_model(arguments.model),
        deployable_probe(arguments.work / "probes.npz", read),
        scored,
        monitor_of(scored, choice),
        [row for row in study_rows(arguments.data) if row.part == "fit"],
        {
            "data": {name: _sum(arguments.data / name) for name in _FILES},
            "read": read,
            "features": features[read],
            "layers_read": LAYERS,
            "statistic": statistic,
            "longest_scored": TOKENS,
            "sampled": "elsewhere, on a GPU, in bfloat16; ids are encoded anew from the text",
        },
    )
    bundle.save(arguments.out)
    LOG.info("%s in %s", bundle.digest, arguments.out)
    for name, value in summary_of(bundle).rows():
        LOG.info("%s: %s", name, value)
    LOG.info("%s", json.dumps(bundle.provenance["finds"]))


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
