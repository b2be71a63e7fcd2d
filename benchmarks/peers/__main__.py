"""Peers beside ours: `python -m benchmarks.peers`; writes `results/peers.jsonl`."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.card import card, write_results
from benchmarks.peers.guard_model import CHUNK_TOKENS, guard_model, guarded_by
from benchmarks.peers.header import EVERY_TOKENS, header_again
from benchmarks.peers.hidden_states import probed_on_host
from benchmarks.peers.onnx_probe import probed_by_onnxruntime
from safe_decode.bench.arms import Arm, ArmCall, Clock, Lap, Load, arms_of, options_of
from safe_decode.bench.models import Subject, embedded_subject, of_shape
from safe_decode.bench.runner import interleaved
from safe_decode.bench.statistics import interval_of

LOG = logging.getLogger("benchmarks.peers")


def peers_of(subject: Subject, load: Load) -> dict[str, tuple[ArmCall, int]]:
    """Build every arm, ours among them: name to what is run and tokens between two checks."""
    tenth, equal = guard_model(subject, 0.1), guard_model(subject, 1.0)
    ours = arms_of(subject, Load(1, load.context, load.new_tokens))
    return {
        "bare": (ours["bare"].run, 0),
        "safe-decode": (ours["guard"].run, 1),
        "guard model, a tenth, own cache": (guarded_by(tenth, subject, "cached"), 1),
        "guard model, equal, own cache": (guarded_by(equal, subject, "cached"), 1),
        "guard model, a tenth, whole prefix": (guarded_by(tenth, subject, "rerun"), 1),
        "output rail on chunks, equal": (guarded_by(equal, subject, "chunked"), CHUNK_TOKENS),
        "header on a forked cache": (header_again(subject), EVERY_TOKENS),
        "hidden states, scikit-learn": (probed_on_host(subject), 1),
        "our tap, onnxruntime": (probed_by_onnxruntime(subject), 1),
    }


def measure(subject: Subject, load: Load, rounds: int) -> list[dict[str, Any]]:
    """Measure every peer beside ours: a row each."""
    built = peers_of(subject, load)
    arms = {name: Arm(name, run) for name, (run, _) in built.items()}
    options = options_of(subject, load)
    laps = interleaved(arms, options, rounds=rounds, clock=load.clock)
    times = {name: _token_us(taken) for name, taken in laps.items()}
    ours = np.median(times["safe-decode"] - times["bare"])
    return [
        {
            "what": name,
            "tokens between checks": gap or None,
            **_figures(times[name], times["bare"], ours),
            "batch": load.batch,
            "n": rounds,
        }
        for name, (_, gap) in built.items()
    ]


def _figures(
    mine: NDArray[np.float64], bare: NDArray[np.float64], ours: float
) -> Mapping[str, object]:
    ratio, added = interval_of(mine / bare), interval_of(mine - bare)
    return {
        "us a token": round(float(np.median(mine)), 1),
        "added us": round(added.point, 1),
        "ratio to bare": round(ratio.point, 4),
        "95 % interval": ratio.as_list(4),
        "times ours": round(float(added.point / ours), 1) if ours > 0 else None,
    }


def _token_us(laps: Sequence[Lap]) -> NDArray[np.float64]:
    # Means, since a chunked check falls on few tokens and costs much there.
    return np.asarray([np.mean(lap.steps) / 1e3 for lap in laps])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", help="instead of the embedded model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    clock: Clock = given.clock
    subject = embedded_subject() if given.shape is None else of_shape(given.shape)
    rows = []
    for batch in given.batch:
        rows += measure(subject, Load(batch, 64, given.new_tokens, clock), given.rounds)
    for row in rows:
        LOG.info("%s", json.dumps(row))
    if not given.dry:
        write_results("peers", rows, card(new_tokens=given.new_tokens, clock=clock))


if __name__ == "__main__":
    main()
