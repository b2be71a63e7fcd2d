"""Study 5: what `locate` costs beside bare forwards: `python -m benchmarks.location.locate_cost`.

The same responses in the same batches, once through the bare model and once with the moments
of every unit channel, interleaved and repeated; the target is at most 1.3 times the time.
Peak memory is that of a process of its own for each arm, the model included.

On two idle cores: about 3 minutes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.location.arguments import journal_of, pair_of, parser_of
from benchmarks.location.pair import Pair
from probes.activations.teacher_forcing import TOKENS_PER_BATCH, encode_response, left_padded
from probes.data.conversations import Conversation
from probes.location.locate import channel_moments
from safe_decode.loading import Loaded

LOG = logging.getLogger("benchmarks.location.locate_cost")

TARGET = 1.3


def main(argv: Sequence[str] | None = None) -> None:
    """Time both arms in turn, and take the peak memory of each."""
    parser = parser_of(__doc__)
    parser.add_argument("--responses", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peak-of", choices=("bare", "locate"), help="internal: one arm, once")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.responses, arguments.repeats = 16, 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pair = pair_of(arguments)
    loaded = pair.load("aligned")
    rows = pair.task(arguments.responses, "locate")
    arms: dict[str, Callable[[], None]] = {
        "bare": lambda: bare_pass(loaded, rows),
        "locate": lambda: locate_pass(loaded, rows),
    }
    if arguments.peak_of:
        arms[arguments.peak_of]()
        sys.stdout.write(json.dumps({"peak_bytes": _own_peak_bytes()}) + "\n")
        return
    fixed = {"responses": arguments.responses, "repeats": arguments.repeats}
    journal = journal_of("cost", pair, arguments, **fixed)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(arguments.repeats + 1):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm()
            if loaded.model.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first pass warms up
                seconds[name].append(time.perf_counter() - began)
    pairs = zip(seconds["locate"], seconds["bare"], strict=True)
    ratios = sorted(one / other for one, other in pairs)
    peaks = {name: _peak(name, pair, arguments) for name in arms}
    row = {
        "table": "cost",
        "responses": len(rows),
        "tokens": sum(len(encode_response(loaded.tokenizer, row).ids) for row in rows),
        "bare_seconds": statistics.median(seconds["bare"]),
        "locate_seconds": statistics.median(seconds["locate"]),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "target": TARGET,
        "met": statistics.median(ratios) <= TARGET,
        "bare_peak_bytes": peaks["bare"],
        "locate_peak_bytes": peaks["locate"],
        "threads": torch.get_num_threads(),
    }
    journal.add("cost", row)
    LOG.info("%s", json.dumps(row))


def locate_pass(loaded: Loaded, rows: Sequence[Conversation]) -> None:
    """Take the moments of every unit channel."""
    channel_moments(loaded.model, loaded.tokenizer, rows)


@torch.inference_mode()
def bare_pass(loaded: Loaded, rows: Sequence[Conversation]) -> None:
    """Run the same responses in batches of the same tokens, and keep nothing."""
    accepted = inspect.signature(loaded.model.forward).parameters
    keep_one = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    encoded = sorted((encode_response(loaded.tokenizer, row).ids for row in rows), key=len)
    begin = 0
    while begin < len(encoded):
        end = begin + 1
        while end < len(encoded) and (end - begin + 1) * len(encoded[end]) <= TOKENS_PER_BATCH:
            end += 1
        inputs = left_padded(encoded[begin:end], loaded.model.device)
        if "position_ids" not in accepted:
            inputs.pop("position_ids")
        loaded.model(**inputs, use_cache=False, **keep_one)
        begin = end


def _peak(arm: str, pair: Pair, arguments: argparse.Namespace) -> int:
    """Return the peak resident memory of a process that runs one arm once."""
    command = [sys.executable, "-m", "benchmarks.location.locate_cost", "--peak-of", arm]
    command += ["--responses", str(arguments.responses), "--pair", pair.name]
    command += ["--aligned", str(pair.aligned_path), "--unaligned", str(pair.unaligned_path)]
    if pair.files:
        command += ["--prompts", *map(str, pair.files)]
    if pair.sources:
        command += ["--sources", *pair.sources]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak: int = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    return peak


def _own_peak_bytes() -> int:
    """Return this process's own peak; what getrusage says outlives exec from the parent."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
